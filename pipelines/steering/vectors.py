"""Steering vectors: one direction a hook point, with where it comes from; as safetensors files.

What a vector is made of is told in `reading.py`; llama.cpp's form of it is in `gguf_vectors.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_whole

FORMAT = "saeql-steering-vector-1"


class VectorError(ValueError):
    """A steering vector's file is missing, damaged, or of something else."""


@dataclass(frozen=True)
class SteeringVector:
    """A direction at one or several hook points.

    `rows` are as they were read, not of norm 1: at strength 1 in unit "raw" a difference of means is added whole.
    """

    name: str
    rows: Mapping[str, torch.Tensor]  # hook point -> [d] float32
    median_norms: Mapping[str, float]  # of activations there: what unit "norm" means
    model_name: str = ""
    model_sha256: str = ""
    made_by: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write a .safetensors file. Raises VectorError for a direction that is not finite or zero."""
        from safetensors.torch import save

        for place, row in self.rows.items():
            if not bool(torch.isfinite(row).all()) or float(row.norm()) == 0:
                raise VectorError(f"the direction at {place} is zero or not finite: it cannot steer")
        about = {
            "format": FORMAT,
            "name": self.name,
            "model_name": self.model_name,
            "model_sha256": self.model_sha256,
            "made_by": self.made_by,
            "median_norms": json.dumps(dict(self.median_norms)),
            "details": json.dumps(dict(self.details)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {place: row.float().contiguous() for place, row in self.rows.items()}
        return write_whole(path, save(rows, metadata=about))

    @classmethod
    def load(cls, path: Path) -> "SteeringVector":
        """Read a file that `save` wrote. Raises VectorError."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise VectorError(f"no steering vector at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                rows = {place: file.get_tensor(place).float() for place in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise VectorError(f"{path} is no safetensors file: {error}") from None
        if about.get("format") != FORMAT:
            raise VectorError(f"{path} is no steering vector of saeql: its format is {about.get('format')!r}")
        wrong = next((p for p, row in rows.items() if row.dim() != 1 or not bool(torch.isfinite(row).all())), None)
        if wrong is not None or not rows:
            raise VectorError(f"{path}: the direction at {wrong or 'no hook point'} is not one finite row")
        return cls(
            about["name"],
            rows,
            json.loads(about["median_norms"]),
            about["model_name"],
            about["model_sha256"],
            about["made_by"],
            json.loads(about["details"]),
        )
