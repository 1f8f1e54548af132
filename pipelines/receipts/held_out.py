"""Examples of the held-out splits of one dictionary: samplers that leave out windows which nearly repeat train."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from saeql.store.evidence import Evidence

from ..split_rows import FeatureRows
from .examples import Examples, NearRows
from .near_copies import near_copies
from .sampler import SampleConfig, Sampler, neighbour_table

if TYPE_CHECKING:
    from ..label_config import LabelConfig


class HeldOut:
    """Samples of calibration and test; each split is prepared when it is first asked for."""

    def __init__(
        self,
        rows: FeatureRows,
        config: SampleConfig,
        *,
        neighbours: np.ndarray | None = None,
        near: NearRows | None = None,
    ):
        """`neighbours` [F, K] and `near` fill rungs N4 and N3; see `Sampler`."""
        self.rows, self.config, self.neighbours, self.near = rows, config, neighbours, near
        self._samplers: dict[str, Sampler] = {}

    @classmethod
    def of_evidence(
        cls, rows: FeatureRows, evidence: Evidence, config: "LabelConfig", near: NearRows | None = None
    ) -> "HeldOut":
        """As `config` says, with the neighbours of `rows.dictionary` where the evidence has them."""
        neighbours = None
        if evidence.has("neighbours"):
            table = evidence.read("neighbours", columns=["dictionary", "feature", "rank", "neighbour"])
            own = np.array([name == rows.dictionary for name in table["dictionary"].to_pylist()], bool)
            columns = {name: table[name].to_numpy()[own] for name in ("feature", "rank", "neighbour")}
            neighbours = neighbour_table(columns, rows.num_features)
        sample = SampleConfig(num=config.num_examples, seed=config.seed)
        return cls(rows, sample, neighbours=neighbours, near=near)

    def reseeded(self, seed: int) -> "HeldOut":
        """Other examples of the same rows, on rungs N0 to N2; which windows are left out is not found anew."""
        other = HeldOut(self.rows, replace(self.config, seed=seed))
        other.left_out = self.left_out
        return other

    @cached_property
    def left_out(self) -> dict[str, np.ndarray]:
        """Split -> [W] bool: windows of calibration and test that nearly repeat a window of train."""
        train = self.rows.train.windows.tokens
        return {s: near_copies(self.rows.of(s).windows.tokens, train) for s in ("calibration", "test")}

    def sampler(self, split: str) -> Sampler:
        """The sampler of 'calibration' or 'test'."""
        if split not in self._samplers:
            self._samplers[split] = Sampler(
                self.rows.of(split),
                self.config,
                left_out=self.left_out[split],
                neighbours=self.neighbours,
                near=self.near if split == "test" else None,
            )
        return self._samplers[split]

    def sample(self, split: str, features: Sequence[int]) -> dict[int, Examples]:
        """Examples of the `features` that have active rows there."""
        return self.sampler(split).sample(features)
