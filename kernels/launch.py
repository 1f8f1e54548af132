"""Which implementation runs an op, and the argument checks that all of them share.

Every op of this folder exists three times:

- `triton`     GPU kernels; on CPU tensors only under `TRITON_INTERPRET=1`, which the tests use;
- `torch`      sparse and pure PyTorch, on every machine: the default wherever the tensors are not on CUDA;
- `reference`  naive and dense, for tests.

The choice is, in this order: the op's `backend=` argument, the innermost `with backend(name)`, the tensors' device.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no wheel for this platform: kernels stay plain functions that `choose_backend` never lets run

    class _MissingTriton:
        constexpr = object

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton = cast(Any, _MissingTriton)
    tl = cast(Any, _MissingTriton)
    HAS_TRITON = False

Backend: TypeAlias = Literal["triton", "torch", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "torch", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_override: ContextVar[Backend | None] = ContextVar("saeql_kernels_backend", default=None)


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}, expected one of {', '.join(BACKENDS)}")
    return cast(Backend, name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the named backend. Raises ValueError for an unknown name."""
    token = _override.set(_known(name))
    try:
        yield
    finally:
        _override.reset(token)


def choose_backend(tensor: Tensor, explicit: str | None = None) -> Backend:
    """The backend for an op on `tensor`. Raises ValueError where the one asked for cannot run."""
    name = _known(explicit) if explicit is not None else _override.get()
    if name is None:
        return "triton" if tensor.is_cuda and HAS_TRITON else "torch"
    if name == "triton":
        if not HAS_TRITON:
            raise ValueError("backend: 'triton' is not installed on this machine; use 'torch'")
        if not tensor.is_cuda and not INTERPRETED:
            raise ValueError(
                f"backend: 'triton' needs CUDA tensors, got {tensor.device.type}; use 'torch',"
                " or set TRITON_INTERPRET=1 before Python starts"
            )
    return name


def guard(**arguments: tuple[Tensor | None, str]) -> None:
    """Check that dimensions of the same name agree and that all tensors share one device.

    `guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"))`. A None is skipped. Raises ValueError naming the argument.
    """
    sizes: dict[str, tuple[int, str]] = {}
    first: tuple[str, torch.device] | None = None
    for name, (tensor, spec) in arguments.items():
        if tensor is None:
            continue
        dims, shape = spec.split(), list(tensor.shape)
        if len(dims) != len(shape):
            raise ValueError(f"{name}: expected shape [{', '.join(dims)}], got {shape}")
        for dim, size in zip(dims, shape, strict=True):
            known, owner = sizes.setdefault(dim, (size, name))
            if known != size:
                raise ValueError(
                    f"{name}: expected shape [{', '.join(dims)}] with {dim} = {known} as in {owner}, got {shape}"
                )
        device = tensor.device
        first = first or (name, device)
        if device != first[1]:
            raise ValueError(f"{name}: is on {device}, but {first[0]} is on {first[1]}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a Triton kernel on the device of its first argument; an empty grid is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        kernel[grid](*args, **meta)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def fast_matmul_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None: a value for `matmul_dtype`."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if kind == "cpu" and any(probe() for probe in probes if probe is not None) else None
