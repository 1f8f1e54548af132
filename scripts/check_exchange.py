"""Compare our readers and writers with the libraries themselves, in both directions, and print a table.

    python scripts/check_exchange.py

Needs sae-lens, eai-sparsify, dictionary-learning and llamascopium beside saeql; those that are not installed are
skipped, which it says.
Reading: a random dictionary of every class is built and saved by the library and read by us. Writing: a random
dictionary of ours is written by us and loaded by the library. Then both encode and decode the same rows. Exits 1 where
they disagree by more than 1e-5 of the largest value, and 2 where none is installed.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from saeql.sae.exchange import DictionaryWeights, read, write

D_IN, D_OUT, D_SAE, K, ROWS = 24, 20, 96, 7, 64
TOLERANCE = 1e-5
Pair = tuple[torch.Tensor, torch.Tensor]  # latents [N, d_sae] and output [N, d_out]
Run = Callable[[torch.Tensor], Pair]


@dataclass(frozen=True)
class Case:
    """One kind of dictionary and how its library makes, saves and loads it."""

    library: str
    kind: str
    make: Callable[[Path], Run]
    """Builds a random one, saves it with the library's code into the folder, returns its forward pass."""
    load: Callable[[Path], Run] | None = None
    """Loads a folder with the library's code, returns its forward pass; None where we only read."""
    ours: Callable[[], DictionaryWeights] | None = None
    """A random one for writing."""
    allow_layer_norm: bool = False


def random_weights(
    architecture: str, form: str = "autoencoder", *, d_out: int = D_IN, **settings: Any
) -> DictionaryWeights:
    """A random dictionary of ours with unit decoder rows; thresholds are inside the range of pre-activations."""
    rows = torch.randn(D_SAE, d_out)
    t = {
        "W_enc": torch.randn(D_SAE, D_IN) / D_IN**0.5,
        "W_dec": rows / rows.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(d_out) * 0.3,
    }
    if architecture == "gated":
        t |= {name: torch.randn(D_SAE) * 0.3 for name in ("b_gate", "r_mag", "b_mag")}
    else:
        t["b_enc"] = torch.randn(D_SAE) * 0.3
    if architecture == "jumprelu":
        t["threshold"] = torch.rand(D_SAE)
    if architecture in ("batchtopk", "matryoshka"):
        t["threshold"] = torch.full((D_SAE,), 0.4)
    if form == "skip_transcoder":
        t["W_skip"] = torch.randn(d_out, D_IN) / D_IN**0.5
    k = K if architecture in ("topk", "batchtopk", "matryoshka") else None
    sizes = {"d_in": D_IN, "d_out": d_out, "d_sae": D_SAE, "k": k}
    return DictionaryWeights(architecture=architecture, form=form, tensors=t, **sizes, **settings)


@torch.no_grad()
def randomise(module: Any) -> None:
    """Random parameters in place of a library's zeros, so that every bias counts; decoders that it set stay."""
    for name, parameter in module.named_parameters():
        if "threshold" in name:
            parameter.copy_(torch.rand_like(parameter))
        elif parameter.ndim == 1:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        elif name.startswith(("W_enc", "encoder", "W_skip")) or not parameter.any():
            parameter.copy_(torch.randn_like(parameter) / D_IN**0.5)


def saelens_runner(sae: Any) -> Run:
    sae.eval()
    return lambda x: (sae.encode(x), sae(x))


def saelens_load(folder: Path) -> Run:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    return saelens_runner(SAE.load_from_disk(folder, device="cpu"))


def saelens_make(architecture: str, **settings: Any) -> Callable[[Path], Run]:
    """An inference class, saved by itself."""
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    def make(folder: Path) -> Run:
        kind, config = get_sae_class(architecture)
        sae = kind(config(d_in=D_IN, d_sae=D_SAE, **settings))
        randomise(sae)
        sae.save_model(folder)
        return saelens_runner(sae)

    return make


def saelens_train(architecture: str, **settings: Any) -> Callable[[Path], Run]:
    """A training class, saved for inference and loaded as what it became."""
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]

    def make(folder: Path) -> Run:
        kind, config = get_sae_training_class(architecture)
        sae = kind(config(d_in=D_IN, d_sae=D_SAE, k=K, **settings))
        randomise(sae)
        with torch.no_grad():
            sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
            sae.topk_threshold.fill_(0.03)
        sae.save_inference_model(folder)
        return saelens_load(folder)

    return make


def saelens_cases() -> list[Case]:
    def case(kind: str, make: Callable[[Path], Run], *which: str, **settings: Any) -> Case:
        allow = "input_norm" in settings
        return Case("sae-lens", kind, make, saelens_load, lambda: random_weights(*which, **settings), allow)

    make, train, ae = saelens_make, saelens_train, {"subtract_b_dec": True}
    to = {"apply_b_dec_to_input": False, "d_out": D_OUT}
    rescaled = make("topk", k=K, rescale_acts_by_decoder_norm=True)
    widths = {"matryoshka_widths": [32, D_SAE]}
    skip, jump_skip = "skip_transcoder", "jumprelu_skip_transcoder"
    normed = make("standard", normalize_activations="layer_norm")
    return [
        case("standard", make("standard"), "relu", **ae),
        case("standard, x as it is", make("standard", apply_b_dec_to_input=False), "relu"),
        case("gated", make("gated"), "gated", **ae),
        case("topk", make("topk", k=K), "topk", **ae),
        case("topk, rescaled by decoder norm", rescaled, "topk", rescale_by_decoder_norm=True, **ae),
        case("jumprelu", make("jumprelu"), "jumprelu", **ae),
        case("batchtopk (as jumprelu)", train("batchtopk"), "batchtopk", **ae),
        case("matryoshka (as jumprelu)", train("matryoshka_batchtopk", **widths), "matryoshka", **ae),
        case("transcoder", make("transcoder", **to), "relu", "transcoder", d_out=D_OUT),
        case(skip, make(skip, **to), "relu", skip, d_out=D_OUT),
        case("jumprelu_transcoder", make("jumprelu_transcoder", **to), "jumprelu", "transcoder", d_out=D_OUT),
        case(jump_skip, make(jump_skip, **to), "jumprelu", skip, d_out=D_OUT),
        case("standard, layer_norm", normed, "relu", input_norm="layer_norm", **ae),
    ]


def sparsify_cases() -> list[Case]:
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]

    def runner(coder: Any) -> Run:
        def run(x: torch.Tensor) -> Pair:
            top = coder.encode(x)
            z = torch.zeros(len(x), D_SAE).scatter(1, top.top_indices, top.top_acts)
            return z, coder(x).sae_out

        return run

    def load(folder: Path) -> Run:
        return runner(SparseCoder.load_from_disk(folder))

    def case(kind: str, ours: Callable[[], DictionaryWeights], **settings: Any) -> Case:
        def make(folder: Path) -> Run:
            coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **settings))
            randomise(coder)
            coder.save_to_disk(folder)
            return runner(coder)

        return Case("eai-sparsify", kind, make, load, ours)

    return [
        case("autoencoder", lambda: random_weights("topk", subtract_b_dec=True)),
        case("transcoder", lambda: random_weights("topk", "transcoder"), transcode=True),
        case(
            "skip transcoder", lambda: random_weights("topk", "skip_transcoder"), transcode=True, skip_connection=True
        ),
    ]


def dictionary_learning_cases() -> list[Case]:
    import json

    from dictionary_learning import dictionary as classes  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # pyright: ignore[reportMissingImports]
        MatryoshkaBatchTopKSAE,
    )
    from dictionary_learning.trainers.top_k import AutoEncoderTopK  # pyright: ignore[reportMissingImports]
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    def load(folder: Path) -> Run:
        loaded = load_dictionary(str(folder), "cpu")[0]
        return lambda x: (loaded.encode(x), loaded(x))

    def case(kind: Any, architecture: str, *arguments: Any, **settings: Any) -> Case:
        def make(folder: Path) -> Run:
            module = kind(D_IN, D_SAE, *arguments)
            randomise(module)
            folder.mkdir(parents=True)
            if hasattr(module, "k"):
                module.threshold.fill_(0.4)
            torch.save(module.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": kind.__name__, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 3}
            config = {"trainer": {**trainer, "lm_name": "m"}, "buffer": {"io": "out", "ctx_len": 128}}
            (folder / "config.json").write_text(json.dumps(config))
            return lambda x: (module.encode(x), module(x))

        return Case("dictionary-learning", kind.__name__, make, load, lambda: random_weights(architecture, **settings))

    return [
        case(classes.AutoEncoder, "relu", subtract_b_dec=True),
        case(AutoEncoderTopK, "topk", K, subtract_b_dec=True),
        case(BatchTopKSAE, "batchtopk", K, subtract_b_dec=True),
        case(classes.GatedAutoEncoder, "gated", subtract_b_dec=True),
        case(classes.JumpReluAutoEncoder, "jumprelu"),
        case(MatryoshkaBatchTopKSAE, "matryoshka", K, [32, D_SAE - 32], subtract_b_dec=True),
    ]


def converter_cases() -> list[Case]:
    """Formats that nobody here can write for real: files in their layout, read by SAELens's converters and by us."""
    import json
    from unittest.mock import patch

    import numpy as np
    from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    def run(loader: Any, folder: Path, repo: str, name: str, scale: float | None = None, **overrides: Any) -> Run:
        def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
            return str(folder / ("checkpoints" if "checkpoints" in subfolder else "") / Path(filename).name)

        shapes = {"w_enc": [D_IN, D_SAE], "w_dec": [D_SAE, D_OUT]}
        with (
            patch.object(loaders, "hf_hub_download", download),
            patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
        ):
            config, state, _ = loader(repo, name, "cpu", cfg_overrides={"dtype": "float32", **overrides})
        config = loaders.handle_config_defaulting(config)
        kind, config_class = get_sae_class(config["architecture"])
        sae = kind(config_class.from_dict(config))
        sae.load_state_dict(state)
        if scale is not None:
            sae.fold_activation_norm_scaling_factor(scale)
        return lambda x: (sae.encode(x), sae(x))

    def gemma_scope(folder: Path) -> Run:
        folder.mkdir()
        t = random_weights("jumprelu").tensors
        arrays: dict[str, Any] = {n: (v.t() if n == "W_enc" else v).numpy() for n, v in t.items()}
        np.savez(folder / "params.npz", **arrays)
        name, sizes = "layer_3/width_16k/average_l0_7", {"d_in": D_IN, "d_sae": D_SAE}
        return run(loaders.gemma_2_sae_huggingface_loader, folder, "google/gemma-scope-2b-pt-res", name, **sizes)

    def gemma_scope_2(folder: Path) -> Run:
        folder.mkdir()
        t = random_weights("jumprelu", "skip_transcoder", d_out=D_OUT).tensors
        file = {"w_enc": t["W_enc"].t(), "w_dec": t["W_dec"], "affine_skip_connection": t["W_skip"].t()}
        file |= {name: t[name] for name in ("b_enc", "b_dec", "threshold")}
        save_file({name: tensor.contiguous() for name, tensor in file.items()}, folder / "params.safetensors")
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True}
        hooks = {"hf_hook_point_in": "model.layers.3.a.output", "hf_hook_point_out": "model.layers.3.b.output"}
        (folder / "config.json").write_text(json.dumps(config | hooks))
        name = "transcoder/layer_3_width_16k_l0_small_affine"
        return run(loaders.gemma_3_sae_huggingface_loader, folder, "google/gemma-scope-2-1b-pt", name)

    def llama_scope(folder: Path) -> Run:
        (folder / "checkpoints").mkdir(parents=True)
        t = random_weights("jumprelu").tensors
        file = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"]}
        file |= {"decoder.weight": t["W_dec"].t().contiguous(), "decoder.bias": t["b_dec"]}
        save_file(file, folder / "checkpoints" / "final.safetensors")
        config = {"d_model": D_IN, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": 0.25}
        config |= {"dataset_average_activation_norm": {"in": 3.0, "out": 3.0}, "hook_point_in": "blocks.3.hook_mlp_out"}
        config |= {"norm_activation": "dataset-wise", "hook_point_out": config["hook_point_in"]}
        (folder / "hyperparams.json").write_text(json.dumps(config))
        return run(loaders.llama_scope_sae_huggingface_loader, folder, "r", "n", D_IN**0.5 / 3.0)

    made = (("Gemma Scope", gemma_scope), ("Gemma Scope 2, affine", gemma_scope_2), ("Llama Scope", llama_scope))
    return [Case("sae-lens", f"converter of {kind}", make) for kind, make in made]


def llamascopium_cases() -> list[Case]:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # pyright: ignore[reportMissingImports]

    def case(kind: str, norm: bool = True, out: str = "a", **settings: Any) -> Case:
        def make(folder: Path) -> Run:
            hooks = {"hook_point_in": "a", "hook_point_out": out}
            sae = SparseAutoEncoder(
                SAEConfig(d_model=D_IN, expansion_factor=D_SAE / D_IN, top_k=K, **hooks, **settings)
            )
            with torch.no_grad():
                for parameter in sae.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
            if norm:
                sae.set_dataset_average_activation_norm({"a": 3.0, "b": 8.0} if out == "b" else {"a": 3.0})
            folder.mkdir()
            sae.save_pretrained(folder)
            sae.cfg.save_hyperparameters(folder)

            def run(x: torch.Tensor) -> Pair:
                given = {"a": x, "b": x} if out == "b" else {"a": x}
                normed, scales = sae.normalize_activations(given, return_scale_factor=True)
                z = sae.encode(normed["a"])
                y = sae.decode(z) / scales[out]
                # top-k by decoder norm: ours come out multiplied by that norm, see sae/exchange/llamascopium.py
                return (z * sae.decoder_norm() if "top" in kind else z), y

            return run

        return Case("llamascopium", kind, make)

    return [
        case("relu", act_fn="relu"),
        case("jumprelu", act_fn="jumprelu"),
        case("jumprelu transcoder", act_fn="jumprelu", out="b"),
        case("jumprelu, no norms", False, act_fn="jumprelu", norm_activation="inference"),
        case("topk", act_fn="topk"),
        case("batchtopk", act_fn="batchtopk"),
    ]


LIBRARIES = {
    "sae-lens": (lambda: [*saelens_cases(), *converter_cases()], "saelens"),
    "eai-sparsify": (sparsify_cases, "sparsify"),
    "dictionary-learning": (dictionary_learning_cases, "dictionary_learning"),
    "llamascopium": (llamascopium_cases, "llamascopium"),
}


def run_ours(weights: DictionaryWeights) -> Run:
    """Our reference forward pass."""

    def run(x: torch.Tensor) -> Pair:
        z = weights.encode_dense(x)
        return z, weights.decode_dense(z, x)

    return run


def compare(ours: Run, theirs: Run) -> tuple[float, float, float]:
    """Largest differences of latents and of output, relative to the largest value, and the latents' average L0."""
    x = torch.randn(ROWS, D_IN)
    with torch.no_grad():
        pairs = list(zip(ours(x), theirs(x), strict=True))
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return errors[0], errors[1], float((pairs[0][1] != 0).sum(1).float().mean())


def check(case: Case, format: str, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Both directions of one case."""
    theirs = case.make(folder / "theirs")
    reading = compare(run_ours(read(folder / "theirs", allow_layer_norm=case.allow_layer_norm)), theirs)
    if case.load is None or case.ours is None:
        return {"read": reading}
    ours = case.ours()
    write(ours, folder / "ours", format)
    # what is loaded must also be what was written: latents rescaled by decoder norms keep their units either way
    writing = compare(run_ours(ours), case.load(folder / "ours"))
    return {"read": reading, "write": writing}


def main() -> int:
    """Print the table; 1 where anything is off, 2 where nothing could be compared."""
    torch.manual_seed(0)
    failed, count = False, 0
    print(f"torch {torch.__version__}, {D_IN} -> {D_SAE} latents, {ROWS} rows, k = {K}\n")
    print("| library | class | direction | latents | output | mean L0 |\n| --- | --- | --- | --- | --- | --- |")
    for library, (cases, format) in LIBRARIES.items():
        try:
            named = f"{library} {version(library)}"
        except PackageNotFoundError:
            print(f"{library} is not installed: skipped", file=sys.stderr)
            continue
        for case in cases():
            with tempfile.TemporaryDirectory() as folder:
                results = check(case, format, Path(folder))
            for direction, (latents, output, l0) in results.items():
                fine = latents <= TOLERANCE and output <= TOLERANCE and 0 < l0 < D_SAE
                failed, count = failed or not fine, count + 1
                mark = "" if fine else " **wrong**"
                print(f"| {named} | {case.kind} | {direction} | {latents:.1e} | {output:.1e}{mark} | {l0:.1f} |")
    return int(failed) if count else 2


if __name__ == "__main__":
    sys.exit(main())
