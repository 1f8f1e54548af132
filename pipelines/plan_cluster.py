"""Training on many GPUs, before it is tried: memory, bytes on the wire and efficiency of a data x feature mesh.

The global batch of N rows is cut over `data` groups; the d_sae latents over the `feature` GPUs of a group. One step:

- every GPU encodes its n = N / data rows on its share of the latents and takes its local top-k;
- over `feature`: the k candidates of every row (value and index, 8 bytes) are gathered, and the partial sums of the
  decoder [n, d_out] are reduced;
- over `data`: dense weight gradients are all-reduced in float32.

Nothing here overlaps communication with computation, so efficiency is a lower bound for the stated rates.
"""

from dataclasses import asdict, dataclass
from typing import Any

from .hardware import Gpu

#: Share of the data sheet's rates that the kernels and the collectives reach: an assumption.
REACHED = 0.6
CANDIDATE_BYTES = 8


@dataclass(frozen=True)
class Step:
    """Shape of the dictionaries' step: one dictionary, or the sum over those of a sweep."""

    batch_tokens: int
    d_in: int
    d_out: int
    d_sae: int
    k: float
    dense: bool


def step_seconds(step: Step, gpu: Gpu) -> float:
    """Roofline time of one step on one GPU: the encoder's matmul, then bytes moved.

    Moved are pre-activations (bfloat16, written and read), four gathers of k rows (decode, value gradients and both
    weight gradients, bfloat16) and Adam (float32 weight and moments read and written, bfloat16 copy). A dense
    architecture has six matmuls instead and its [N, d_sae] tensors in float32.
    """
    n, width = step.batch_tokens, step.d_in + step.d_out
    encoder = 2 * n * step.d_in * step.d_sae
    moved = step.d_sae * width * 26.0
    if step.dense:
        flops = 3 * 2 * n * step.d_sae * width
        moved += 10 * n * step.d_sae * 4 + step.d_sae * width * 8
    else:
        flops = encoder
        moved += 4.0 * n * step.d_sae + 2 * n * step.k * width * 2
    return (flops / gpu.bf16_flops + moved / gpu.memory_rate) / REACHED


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs. Bytes are per GPU; wire bytes are those it sends in one step."""

    data: int
    feature: int
    memory_bytes: float
    data_wire_bytes: float
    feature_wire_bytes: float
    step_seconds: float
    compute_seconds: float
    tokens_per_second: float
    efficiency: float  # against one GPU that had the memory, times their number

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


def layout(step: Step, gpu: Gpu, data: int, feature: int, gpus_per_node: int, other_bytes: float) -> Layout:
    """Memory, wire and time of a mesh; the `feature` GPUs of a group are neighbours. `other_bytes`: buffer, context."""
    n, width = step.batch_tokens / data, step.d_in + step.d_out
    weights = step.d_sae / feature * width
    gradient = weights * 4 if data > 1 or step.dense else 0.0  # one GPU never has its sparse gradient in memory
    per_row = 4 * (2 * step.d_in + 3 * step.d_out) + (12.0 * step.d_sae / feature if step.dense else 24 * step.k)
    pre = 0.0 if step.dense else min(2**30, 2 * n * step.d_sae / feature)
    memory = other_bytes + weights * (4 + 8 + 2) + gradient + n * per_row + pre
    data_wire = 2 * (data - 1) / data * gradient
    candidates = 0.0 if step.dense else (feature - 1) * n * step.k * CANDIDATE_BYTES
    feature_wire = candidates + 2 * (feature - 1) / feature * n * step.d_out * 4
    own = Step(round(n), step.d_in, step.d_out, -(-step.d_sae // feature), step.k / feature, step.dense)
    compute = step_seconds(own, gpu)
    near = feature <= gpus_per_node
    feature_rate = gpu.node_link_rate if near else gpu.network_rate
    data_rate = gpu.node_link_rate if data * feature <= gpus_per_node else gpu.network_rate
    seconds = compute + (data_wire / data_rate + feature_wire / feature_rate) / REACHED
    alone = step_seconds(step, gpu)
    rate = step.batch_tokens / seconds
    efficiency = alone / (seconds * data * feature)
    return Layout(data, feature, memory, data_wire, feature_wire, seconds, compute, rate, efficiency)


def layouts(step: Step, gpu: Gpu, nodes: int, gpus_per_node: int, other_bytes: float) -> list[Layout]:
    """Data-parallel, feature-sharded in every node, over everything, and in one node alone; the fastest first."""
    count = nodes * gpus_per_node
    meshes = {(count, 1), (nodes, gpus_per_node), (1, count), (1, gpus_per_node)}
    meshes = {(d, f) for d, f in meshes if d <= step.batch_tokens and f <= step.d_sae}
    made = [layout(step, gpu, d, f, gpus_per_node, other_bytes) for d, f in sorted(meshes)]
    return sorted(made, key=lambda m: m.step_seconds)


def batch_for_efficiency(step: Step, gpu: Gpu, mesh: Layout, gpus_per_node: int, wanted: float = 0.8) -> int | None:
    """Smallest power of two times the batch at which a mesh reaches `wanted`; None where 2^16 times is not enough."""
    for power in range(17):
        larger = Step(step.batch_tokens * 2**power, step.d_in, step.d_out, step.d_sae, step.k, step.dense)
        if layout(larger, gpu, mesh.data, mesh.feature, gpus_per_node, 0.0).efficiency >= wanted:
            return larger.batch_tokens
    return None
