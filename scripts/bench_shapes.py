"""What the benchmarks run on: shapes, and rows that excite latents unevenly, as real activations do."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One top-k dictionary and a batch for it. `dead` is the share of latents declared dead."""

    rows: int
    d_in: int
    d_sae: int
    k: int
    dead: float
    device: str

    @property
    def num_dead(self) -> int:
        """Latents declared dead."""
        return int(self.dead * self.d_sae)

    def __str__(self) -> str:
        dead = f", {self.dead:.0%} dead" if self.dead else ""
        return f"{self.rows} rows, d_in {self.d_in}, d_sae {self.d_sae}, k {self.k}{dead}"


#: By device, as `--shapes` takes them; the most telling one first, since a run may be cut short.
DEFAULTS = {
    "cpu": ("1024,576,9216,32", "2048,576,18432,32"),
    "cuda": ("16384,768,32768,32", "4096,768,24576,32", "4096,768,32768,32", "4096,2304,65536,64"),
}
#: Odd in every dimension, so that every mask of every kernel is needed.
ODD = "7,63,130,5"


def parse_shape(text: str, dead: float, device: str) -> Shape:
    """`rows,d_in,d_sae,k`. Raises ValueError for anything else."""
    try:
        rows, d_in, d_sae, k = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shapes: expected rows,d_in,d_sae,k such as {DEFAULTS['cpu'][0]}, got {text!r}") from None
    if min(rows, d_in, k) < 1 or k > d_sae:
        raise ValueError(f"--shapes: {text} needs positive numbers and k of at most d_sae")
    return Shape(rows, d_in, d_sae, k, dead, device)


def make_rows(num: int, shape: Shape) -> list[torch.Tensor]:
    """`num` batches [rows, d_in] with unit variance: sparse mixtures of directions with a skewed prior, plus noise."""
    device = shape.device
    generator = torch.Generator(device).manual_seed(0)
    directions = torch.randn(4 * shape.d_in, shape.d_in, generator=generator, device=device)
    directions = torch.nn.functional.normalize(directions, dim=1)
    prior = 1 / torch.arange(1, 4 * shape.d_in + 1, device=device) ** 0.7
    batches = []
    for _ in range(num):
        chosen = torch.multinomial(prior, shape.rows * 24, replacement=True, generator=generator).view(shape.rows, 24)
        weight = torch.rand(shape.rows, 24, generator=generator, device=device) + 0.5
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weight, mode="sum")
        x += 0.05 * torch.randn(shape.rows, shape.d_in, generator=generator, device=device)
        batches.append((x - x.mean(0)) / x.std())
    return batches
