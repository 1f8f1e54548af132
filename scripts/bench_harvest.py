"""Harvest against the bare forward pass, against SAELens's ActivationsStore, and the memory that it takes.

    python scripts/bench_harvest.py [--json FILE]            speed; SAELens too where it can be imported
    python scripts/bench_harvest.py --memory [--json FILE]   anonymous memory of two harvests of different length

Speed: a whole harvest of real text with the embedded model: reading, tokenising, the forward pass up to the hook
point, norms, shards with their hashes, evidence. Right after every forward pass of it the same windows go through the
bare model, cut off after the hook point's layer and without hooks, and through SAELens's
`ActivationsStore.get_raw_llm_batch`, which is given them as a tokenised dataset (its cheapest input; what it does to
mix activations is left out). So all are interleaved batch by batch, and the others' time is taken off the harvest's.
One thread computes; CPU time counts every thread.

Memory: the highest anonymous memory of a harvest with a tiny model and random text, at two lengths, each in a process
of its own; the difference is what grows with the corpus.
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from saeql.pipelines.corpus import CorpusConfig
from saeql.pipelines.footprint import anonymous_bytes
from saeql.pipelines.harvest import HarvestConfig, harvest
from saeql.pipelines.models import LanguageModel, ModelConfig, ModelIdentity, load_model
from saeql.pipelines.reading import WindowReader
from saeql.pipelines.text_sources import EMBEDDED_TEXT, SourceConfig, read_rows
from saeql.sae.hooks import Capture
from saeql.store.evidence import Evidence

BARE, PEER, FORWARD = "bare forward pass", "SAELens's store", "forward pass inside the harvest"


class Clocks:
    """CPU time of this thread and wall time, by what they were spent on."""

    def __init__(self):
        self.seconds: dict[str, tuple[float, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work on a name's account."""
        cpu, wall = time.thread_time(), time.perf_counter()
        result = work()
        before = self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = (before[0] + time.thread_time() - cpu, before[1] + time.perf_counter() - wall)
        return result


def peer_store(lm: LanguageModel, hook_point: str, windows: list[torch.Tensor], config: HarvestConfig) -> Any:
    """SAELens's store over the same windows, or None where SAELens is not there."""
    try:
        from datasets import Dataset
        from sae_lens import ActivationsStore  # pyright: ignore[reportMissingImports]
        from sae_lens.load_model import HookedProxyLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    name = f"model.layers.{hook_point.rpartition('.')[2]}"
    warnings.simplefilter("ignore")
    return ActivationsStore(
        model=HookedProxyLM(lm.model, lm.tokenizer, hook_names=[name]),
        dataset=Dataset.from_dict({"input_ids": [window.tolist() for window in windows]}),
        streaming=False,
        hook_name=name,
        hook_head_index=None,
        context_size=config.context_tokens,
        d_in=lm.model.config.hidden_size,
        n_batches_in_buffer=2,
        total_training_tokens=len(windows),
        store_batch_size_prompts=config.batch_windows,
        train_batch_size_tokens=config.batch_windows * config.context_tokens,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=str(lm.model.dtype).removeprefix("torch."),
    )


def windows_of(lm: LanguageModel, corpus: CorpusConfig, config: HarvestConfig) -> list[torch.Tensor]:
    """Windows [T] of a harvest in the order in which they go through the model."""
    batches = WindowReader(lm, corpus, config).batches()
    return [torch.from_numpy(window) for batch in batches for window in batch.token_ids]


def timed_harvest(dtype: str, text: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One harvest with the others between its batches."""
    model_config = ModelConfig(hook_point=args.hook_point, truncate=True, dtype=dtype, device="cpu")
    lm, bare = load_model(model_config), load_model(model_config)
    corpus = CorpusConfig(source=str(text), max_tokens=args.tokens)
    config = HarvestConfig(context_tokens=args.context_tokens, batch_windows=args.batch_windows)

    def run(to: Path, corpus: CorpusConfig) -> None:
        harvest(lm, [args.hook_point], corpus, config, to / "activations", Evidence(to / "evidence"))

    run(folder / "first", replace(corpus, max_tokens=8000))  # what is done once in a process
    windows = windows_of(lm, corpus, config)
    clocks = Clocks()
    # a model of its own: the hooks of SAELens's wrapper stay on it
    store = peer_store(load_model(replace(model_config, truncate=False)), args.hook_point, windows, config)
    forward, largest, peer_tokens = Capture.run, 0.0, 0

    def followed(self: Capture, input_ids: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        nonlocal largest, peer_tokens
        found = clocks.run(FORWARD, lambda: forward(self, input_ids, *rest))
        if input_ids.shape[1] == config.context_tokens:  # not the one that finds the widths
            clocks.run(BARE, lambda: bare.model.base_model(input_ids=input_ids, use_cache=False))
            if store is not None and len(input_ids) == config.batch_windows:
                acts, ids = clocks.run(PEER, store.get_raw_llm_batch)
                assert torch.equal(ids.view(input_ids.shape), input_ids), "SAELens read other windows"
                mine = found[args.hook_point].float()
                largest = max(largest, float((acts.view(mine.shape).float() - mine).abs().max() / mine.abs().max()))
                peer_tokens += input_ids.numel()
        return found

    with patch.object(Capture, "run", followed):
        cpu, wall = time.process_time(), time.perf_counter()
        run(folder / "timed", corpus)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = len(windows) * config.context_tokens
    taken_off = [clocks.seconds.get(name, (0.0, 0.0)) for name in (BARE, PEER)]
    cpu, wall = cpu - sum(t[0] for t in taken_off), wall - sum(t[1] for t in taken_off)
    return {
        "dtype": dtype,
        "tokens": tokens,
        "harvest_tokens_per_cpu_second": tokens / cpu,
        "bare_tokens_per_cpu_second": tokens / clocks.seconds[BARE][0],
        "harvest_tokens_per_second": tokens / wall,
        "bare_tokens_per_second": tokens / clocks.seconds[BARE][1],
        "ratio_cpu": clocks.seconds[BARE][0] / cpu,
        "ratio_wall": clocks.seconds[BARE][1] / wall,
        "share_of_cpu_in_the_forward_pass": clocks.seconds[FORWARD][0] / cpu,
        **(
            {
                "saelens_tokens_per_cpu_second": peer_tokens / clocks.seconds[PEER][0],
                "saelens_tokens_per_second": peer_tokens / clocks.seconds[PEER][1],
                "largest_difference_from_saelens": largest,
            }
            if store is not None
            else {}
        ),
    }


def measure_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both dtypes, on the embedded text as JSON lines."""
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        text = args.text or folder / "text.jsonl"
        if not text.exists():
            with text.open("w", encoding="utf-8") as file:
                for row in read_rows(SourceConfig(source=EMBEDDED_TEXT)):
                    file.write(json.dumps(row.fields) + "\n")
        for dtype in args.dtypes:
            result = timed_harvest(dtype, text, args, folder / dtype)
            found.append(result)
            for name, value in result.items():
                print(f"{name:36} {value}" if isinstance(value, str) else f"{name:36} {value:,.4g}", flush=True)
    by_dtype = {result["dtype"]: result for result in found}
    peer = by_dtype.get("float32", {}).get("saelens_tokens_per_cpu_second")
    for dtype, result in by_dtype.items() if peer else ():
        result["times_saelens_float32"] = result["harvest_tokens_per_cpu_second"] / peer
        print(f"{dtype}: {result['times_saelens_float32']:.2f} x SAELens in float32, CPU time")
    return found


# --- memory ----------------------------------------------------------------------------------------------------------


def tiny_model(folder: Path) -> LanguageModel:
    """One small layer with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{n}": n + 3 for n in range(1000)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    identity = ModelIdentity("tiny", "0" * 64, "0" * 64, "resid_post.0")
    return LanguageModel(model, tokenizer, identity, torch.device("cpu"))


def one_memory(tokens: int, folder: Path) -> int:
    """Highest anonymous memory of a harvest of so many tokens, looked at after every forward pass and at the end."""
    text, rng = folder / "text.jsonl", random.Random(0)
    with text.open("w") as file:
        for _ in range(tokens // 250):
            file.write(json.dumps({"text": " ".join(f"w{rng.randrange(1000)}" for _ in range(300))}) + "\n")
    lm, peak, forward = tiny_model(folder), 0, Capture.run

    def followed(self: Capture, *given: Any) -> dict[str, torch.Tensor]:
        nonlocal peak
        found = forward(self, *given)
        peak = max(peak, anonymous_bytes())
        return found

    corpus, config = CorpusConfig(source=str(text), max_tokens=tokens), HarvestConfig(context_tokens=128)
    with patch.object(Capture, "run", followed):
        harvest(lm, ["resid_post.0"], corpus, config, folder / "activations", Evidence(folder / "evidence"))
    return max(peak, anonymous_bytes())


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Two lengths, each in a process of its own."""
    peaks = {}
    for tokens in args.memory_tokens:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--one-memory", str(tokens), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[tokens] = int(done.stdout.split()[-1])
        print(f"{tokens:>12,} tokens: {peaks[tokens] / 1e6:.1f} MB of anonymous memory at most", flush=True)
    short, long = args.memory_tokens
    growth = (peaks[long] - peaks[short]) / (long - short) * 1e6
    print(f"growth: {growth / 1e6:.2f} MB per million tokens")
    return {"peak_bytes": peaks, "bytes_per_million_tokens": growth}


def main() -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--hook-point", default="resid_post.9")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--batch-windows", type=int, default=16)
    parser.add_argument("--memory-tokens", nargs=2, type=int, default=[1_000_000, 4_000_000])
    parser.add_argument("--one-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help="JSON lines to read; made of the embedded text where there are none")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--json", type=Path, help="file that the numbers are added to")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if args.one_memory:
        print(one_memory(args.one_memory, args.folder))
        return
    key, found = ("memory", measure_memory(args)) if args.memory else ("speed", measure_speed(args))
    if args.json:
        data = json.loads(args.json.read_text()) if args.json.exists() else {}
        data |= {
            "date": datetime.date.today().isoformat(),
            "machine": platform.machine(),
            "versions": {"torch": torch.__version__},
            "load": os.getloadavg(),
            "threads": 1,
            key: found,
        }
        if key == "speed":
            data["shape"] = {k: getattr(args, k) for k in ("hook_point", "context_tokens", "batch_windows")}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
