"""Compile every kernel for a GPU that need not be there, and print what it uses as JSON. Run by test_aot.py.

A process of its own: under TRITON_INTERPRET=1, which the other tests set, nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saeql.kernels import (
    batch_topk,
    entries,
    fused_adam,
    index_transpose,
    jumprelu,
    latent_rows,
    sparse_adam,
    sparse_grads,
    sparse_matmul,
    topk,
)

D, D_SAE, K = 768, 32768, 32
BF16, FP32, INT, LONG, NUM, FLOAT = "*bf16", "*fp32", "*i32", "*i64", "i32", "fp32"
ADAM = [NUM, *[FLOAT] * 6]


def encode(dtype: str, d: int, warps: int, n: int, f: int, block_d: int, precision: str) -> tuple[Any, ...]:
    meta = {"PRECISION": precision, "WIDEN": False, "GROUP": 32, "BLOCK_N": n, "BLOCK_F": f, "BLOCK_D": block_d}
    options = {"num_warps": warps, "num_stages": 3}
    return topk.encode_group_max_fwd_kernel, [*[dtype] * 5, NUM, NUM, NUM, NUM], meta, options


def select(dtype: str, k: int, warps: int) -> tuple[Any, ...]:
    group = topk.group_size(D_SAE, k)
    block_k = triton.next_power_of_2(k)
    meta = {"RELU": True, "BITS": 16 if dtype == BF16 else 32, "GROUP": group, "BLOCK_G": D_SAE // group}
    signature = [dtype, dtype, INT, dtype, LONG, NUM, NUM, NUM]
    return topk.topk_select_fwd_kernel, signature, {**meta, "BLOCK_K": block_k}, {"num_warps": warps}


def transpose_cases() -> dict[str, tuple[Any, ...]]:
    four = {"num_warps": 4}
    meta = {"SHIFT": 8, "DIGITS": 256, "BLOCK": index_transpose.BLOCK}
    first, last = {"FIRST": True, "LAST": False}, {"FIRST": False, "LAST": True}
    scatter = index_transpose.digit_scatter_fwd_kernel
    return {
        "digit_count": (index_transpose.digit_count_fwd_kernel, [INT, INT, INT, NUM, NUM], meta, four),
        "digit_scatter_first": (scatter, [LONG, LONG, INT, INT, INT, INT, NUM, NUM, NUM], {**first, **meta}, four),
        "digit_scatter_last": (scatter, [INT, INT, INT, INT, LONG, INT, NUM, NUM, NUM], {**last, **meta}, four),
    }


def jumprelu_cases(dtype: str) -> dict[str, tuple[Any, ...]]:
    four = {"num_warps": 4}
    flags = {"IS_L0": False, "STE_TO_INPUT": True, "HAS_GRAD_PRE": True}
    tile = {"BLOCK_N": jumprelu.ROWS, "BLOCK_F": jumprelu.COLUMNS}
    backward = [dtype, FP32, dtype, dtype, FP32, NUM, NUM, NUM, FLOAT]
    l0_flags = {"IS_L0": True, "STE_TO_INPUT": False, "HAS_GRAD_PRE": False}
    return {
        "jumprelu": (jumprelu.jumprelu_fwd_kernel, [dtype, FP32, dtype, NUM], {"BLOCK": 1024}, four),
        "step_l0": (jumprelu.step_l0_fwd_kernel, [dtype, FP32, FP32, NUM], {"BLOCK": 2048}, four),
        "jumprelu_bwd": (jumprelu.jumprelu_bwd_kernel, backward, {**flags, **tile}, four),
        "step_l0_bwd": (
            jumprelu.jumprelu_bwd_kernel,
            [dtype, FP32, FP32, dtype, FP32, NUM, NUM, NUM, FLOAT],
            {**l0_flags, **tile},
            four,
        ),
    }


def threshold_cases(dtype: str) -> dict[str, tuple[Any, ...]]:
    warps, n, f, d = (8, 128, 128, 64) if dtype == BF16 else (4, 64, 64, 32)
    meta = {"PRECISION": "ieee", "WIDEN": False, "BLOCK_N": n, "BLOCK_F": f, "BLOCK_D": d}
    compact = {"TILES": batch_topk.COMPACT_COLUMNS // f, "BLOCK_F": f}
    return {
        "encode_count": (
            batch_topk.encode_count_fwd_kernel,
            [*[dtype] * 3, FP32, dtype, INT, NUM, NUM, NUM, NUM],
            meta,
            {"num_warps": warps, "num_stages": 3},
        ),
        "compact": (
            batch_topk.compact_fwd_kernel,
            [dtype, FP32, INT, LONG, LONG, dtype, NUM, NUM],
            compact,
            {"num_warps": 4},
        ),
    }


def cases(dtype: str) -> dict[str, tuple[Any, ...]]:
    """name -> kernel, argument types, constants, options: as the host wrappers choose them at the sizes above."""
    unit, four, eight = {"PROJECT": True, "RENORMALIZE": True}, {"num_warps": 4}, {"num_warps": 8}
    half = dtype == BF16
    segment = {"SEGMENT": latent_rows.SEGMENT}
    return {
        **(transpose_cases() if half else {}),
        **jumprelu_cases(dtype),
        **threshold_cases(dtype),
        "segment_sum": (
            latent_rows.segment_sum_fwd_kernel,
            [dtype, INT, INT, INT, dtype, FP32, NUM],
            {**segment, "BLOCK_T": 8, "BLOCK_D": 512},
            four,
        ),
        "encode": encode(dtype, D, *((8, 128, 128, 64) if half else (4, 64, 64, 32)), "ieee"),
        "encode_tf32": encode(dtype, D, *((8, 128, 128, 64) if half else (4, 64, 64, 32)), "tf32"),
        "group_max": (topk.group_max_fwd_kernel, [dtype, dtype, NUM, NUM], {"GROUP": 32, "BLOCK_G": 64}, four),
        "select": select(dtype, K, 4),
        "select_k288": select(dtype, 288, 8),
        "select_candidates": select(dtype, batch_topk.candidates_per_row(64, D_SAE), 8),
        "gather_sum": (
            sparse_matmul.gather_sum_fwd_kernel,
            [dtype, LONG, dtype, dtype, dtype, NUM, NUM],
            {"HAS_BIAS": True, "BLOCK_K": 8, "BLOCK_D": 512},
            four,
        ),
        "sampled_dot": (
            sparse_matmul.sampled_dot_fwd_kernel,
            [dtype, dtype, LONG, dtype, NUM, NUM],
            {"BLOCK_K": 16, "BLOCK_D": 256},
            four,
        ),
        "scatter_sum": (
            sparse_matmul.scatter_sum_fwd_kernel,
            [dtype, INT, INT, dtype, FP32, dtype, NUM],
            {**segment, "BLOCK_T": 8, "BLOCK_D": 512},
            four,
        ),
        "square_norm": (
            sparse_grads.square_norm_fwd_kernel,
            [dtype, INT, INT, dtype, FP32, dtype, INT, FP32, NUM],
            {"HAS_ROWS": True, **segment, "BLOCK_T": 4, "BLOCK_D": 1024},
            four,
        ),
        "entry_dot": (
            entries.entry_dot_fwd_kernel,
            [dtype, dtype, LONG, LONG, dtype, NUM, NUM],
            {"BLOCK_E": 16, "BLOCK_D": 256},
            four,
        ),
        "adam_rows": (
            fused_adam.adam_rows_fwd_kernel,
            [dtype, dtype, FP32, FP32, *ADAM],
            {**unit, "BLOCK_D": 1024},
            eight,
        ),
        "sparse_adam": (
            sparse_adam.sparse_adam_bwd_kernel,
            [dtype, INT, INT, dtype, FP32, dtype, INT, dtype, dtype, dtype, BF16, *ADAM],
            {**unit, "HAS_ROWS": True, "HAS_COPY": True, **segment, "BLOCK_T": 4, "BLOCK_D": 1024},
            eight,
        ),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and local memory (spills) by the cuobjdump that comes with Triton; empty where it does not."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": fields["REG"], "spills": fields["STACK"] + fields["LOCAL"]}


def main(capability: int) -> None:
    report: dict[str, dict[str, int]] = {}
    for dtype in (BF16, FP32):
        for name, (kernel, types, constants, options) in cases(dtype).items():
            names = [arg for arg in kernel.arg_names if arg not in constants]
            signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
            # Widths and pointers are multiples of 16 at these shapes, as the launcher finds out by itself.
            aligned = {
                (kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in names if signature[arg] != FLOAT
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            report[f"{name}-{dtype[1:]}"] = {"shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])}
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
