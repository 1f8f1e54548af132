"""A real, tiny language model on disk, and a corpus to read with it: what pipeline tests run on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests multiply small matrices: a second thread only waits for the first, on a busy machine for long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

WORDS = ["river", "bank", "music", "walking", "talking", "seven", "12", "1984", "The", "the", "and", "blue", "house",
         "Paris", "runs", "quickly", "of", "stone", "green", "water"]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers with random weights and a word-level tokenizer with BOS and EOS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, ".": 3, ",": 4}
    for word in WORDS:
        vocabulary[f"Ġ{word}"] = len(vocabulary)
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab={**vocabulary, **{c: len(vocabulary) + n for n, c in enumerate(_letters())}},
                                   merges=[], unk_token="<unk>", ignore_merges=True))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short documents of the tiny model's words, as JSON lines."""
    import json
    import random

    rng = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = []
    for _ in range(200):
        words = [rng.choice(WORDS) + rng.choice(["", "", "", ".", ","]) for _ in range(60)]
        lines.append(json.dumps({"text": " ".join(words)}))
    file.write_text("\n".join(lines) + "\n")
    return file


TINY_CONFIG = """
seed = 3
[model]
name = "{model}"
hook_point = "resid_post.1"
dtype = "float32"
[corpus]
source = "{corpus}"
max_tokens = 0
[harvest]
context_tokens = 32
batch_windows = 8
windows_per_shard = 64
[dictionary]
d_sae = 96
k = 4
[train]
num_steps = 60
batch_tokens = 128
init_tokens = 512
checkpoint_every_steps = 25
log_every_steps = 10
dead_after_tokens = 1000
shuffle_block_rows = 64
matmul_dtype = "float32"
[evaluate]
ce_windows = 12
"""


@pytest.fixture(scope="session")
def tiny_config(tiny_model_folder: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run that takes seconds."""
    file = tmp_path_factory.mktemp("config") / "tiny.toml"
    file.write_text(TINY_CONFIG.format(model=tiny_model_folder, corpus=tiny_corpus))
    return file


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny configuration, made by the command line. Tests must not change it."""
    from saeql.pipelines.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    main(["run", str(tiny_config), "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def token_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed run whose feature i fires on token id i + 3 alone and points to its logit. Not to be changed."""
    import torch

    from saeql.pipelines import Run, load_config, save_dictionary

    keys = {"model.hook_point": "resid_pre.0", "train.num_steps": "5", "train.warmup_steps": "1"}
    run = Run.create(tmp_path_factory.mktemp("runs") / "tokens", load_config(tiny_config, keys))
    list(run.execute(("harvest", "train")))
    dictionary, model = run.dictionary(), run.language_model.model
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        rows = model.get_input_embeddings().weight[3 : 3 + dictionary.d_sae]
        unembedding = model.get_output_embeddings().weight[3 : 3 + dictionary.d_sae]
        dictionary.W_enc.copy_(rows / rows.norm(dim=1, keepdim=True) ** 2)
        dictionary.b_enc.fill_(-0.8)  # other tokens have cosines below it
        dictionary.W_dec.copy_(unembedding / unembedding.norm(dim=1, keepdim=True))
    save_dictionary(dictionary, run.dictionary_path)
    list(run.execute(("index",)))
    return run.path


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three layers with random weights and the tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder, tokenizer = tmp_path_factory.mktemp("encoder"), AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def start() -> Callable[..., BaseProcess]:
    """Starts a command of saeql in a process of its own, from one that has the libraries loaded."""
    from saeql.pipelines.cli import main

    context = multiprocessing.get_context("forkserver")
    libraries = ["transformers.models.llama.modeling_llama", "transformers.tokenization_utils_fast"]
    context.set_forkserver_preload(["saeql.pipelines.cli", "saeql.pipelines.run", *libraries])

    def begin(*argv: object) -> BaseProcess:
        process = context.Process(target=main, args=([str(a) for a in argv],), daemon=True)
        process.start()
        return process

    return begin
