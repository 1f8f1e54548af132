"""Neuronpedia's bulk format: a folder a source, which its import reads.

release, model, sourceset and source `.jsonl`, and `features/`, `activations/` and `explanations/` in `batch-N.jsonl.gz`
of 1024 features. Written for SAEs (hijohnnylin/neuronpedia, August 2026). Ids are hashes of what they name, so the same
run gives the same files. Correlations with neurons and features are not measured and stay empty.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import write_whole
from .dashboards import Dashboard, dashboards
from .saedashboard import bin_of, measured, rounded, source_names

if TYPE_CHECKING:
    from .run import Run

BATCH_FEATURES = 1024
EXPLANATION_TYPE = "saeql_predicate"
_RECEIPT = ("kind", "auroc", "auroc_low", "auroc_high", "f1", "n_active", "n_inactive")


def export_neuronpedia(run: "Run", folder: Path, *, creator: str, creator_id: str, release: str) -> Path:
    """Write `folder/<model>/<source>/` and return it. Raises StoreError before the store is built."""
    source = _Source(run, creator, creator_id, release)
    home = folder / source.model / source.id
    for name in ("features", "activations", "explanations"):
        (home / name).mkdir(parents=True, exist_ok=True)
    for name, row in source.tables().items():
        write_whole(home / f"{name}.jsonl", _lines([row]))
    for n, batch in enumerate(dashboards(run, BATCH_FEATURES)):
        explained = [d for d in batch if d.row["kind"] != "none"]
        _write(home / "features" / f"batch-{n}.jsonl.gz", map(source.feature, batch))
        _write(home / "activations" / f"batch-{n}.jsonl.gz", (a for d in batch for a in source.activations(d)))
        _write(home / "explanations" / f"batch-{n}.jsonl.gz", map(source.explanation, explained))
    return home


class _Source:
    """One dictionary as Neuronpedia names it."""

    def __init__(self, run: "Run", creator: str, creator_id: str, release: str):
        self.run, self.creator, self.creator_id, self.release = run, creator, creator_id, release
        names = source_names(run)
        self.model, self.set_name, self.num_windows = names["model_id"], names["sae_set"], names["num_windows"]
        self.id = f"{names['layer']}-{self.set_name}"
        writes = run.spec.writes[-1]
        self.hook_name = run.harvest_info.module_names.get(writes, (writes, ""))[0]
        self.created = run.finished()["store"]["finished"]

    def tables(self) -> dict[str, dict[str, Any]]:
        run, info = self.run, self.run.harvest_info
        config = run.language_model.model.config
        by = {"creatorId": self.creator_id, "createdAt": self.created}
        title = f"{run.spec.name} at {' + '.join(run.spec.reads)} of {self.model}"
        return {
            "release": {
                "name": self.release, "description": title, "descriptionShort": run.spec.name, "urls": [],
                "creatorName": self.creator, "creatorNameShort": self.creator, "visibility": "PUBLIC", **by,
            },
            "model": {
                "id": self.model, "displayName": self.model, "displayNameShort": self.model,
                "instruct": "instruct" in self.model.lower() or self.model.endswith("-it"),
                "layers": getattr(config, "num_hidden_layers", 0), "dimension": getattr(config, "hidden_size", None),
                "neuronsPerLayer": getattr(config, "intermediate_size", 0) or 0, "visibility": "PUBLIC",
                "updatedAt": self.created, **by,
            },
            "sourceset": {
                "modelId": self.model, "name": self.set_name, "description": title, "creatorName": self.creator,
                "releaseName": self.release, "type": run.spec.config.architecture, "visibility": "PUBLIC", **by,
            },
            "source": {
                "id": self.id, "modelId": self.model, "setName": self.set_name, "dataset": run.config.corpus.title,
                "num_prompts": self.num_windows, "num_tokens_in_prompt": info.context_tokens,
                "visibility": "PUBLIC", **by,
            },
        }  # fmt: skip

    def feature(self, dashboard: Dashboard) -> dict[str, Any]:
        largest = dashboard.row["max_activation"]
        return {
            **self._of(dashboard),
            "creatorId": self.creator_id,
            "createdAt": self.created,
            "maxActApprox": largest,
            "hasVector": True,
            "vector": dashboard.vector,
            "vectorLabel": None,
            "vectorDefaultSteerStrength": largest,
            "hookName": self.hook_name,
            "topkCosSimIndices": [n for n, _ in dashboard.neighbours],
            "topkCosSimValues": rounded([cosine for _, cosine in dashboard.neighbours]),
            **measured(dashboard),
            "sourceSetName": self.set_name,
        }

    def activations(self, dashboard: Dashboard) -> Iterable[dict[str, Any]]:
        for n, sequence in enumerate(dashboard.sequences):
            low, high, share = bin_of(sequence)
            values = rounded(sequence.activations)
            yield {
                "id": _id(self.model, self.id, dashboard.feature, "activation", n),
                **self._of(dashboard),
                "tokens": sequence.tokens,
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "creatorId": self.creator_id,
                "createdAt": self.created,
                "dataSource": None,
                "dataIndex": None,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
                "binMin": low,
                "binMax": high,
                "binContains": share,
                "qualifyingTokenIndex": sequence.focus,
            }

    def explanation(self, dashboard: Dashboard) -> dict[str, Any]:
        row = dashboard.row
        receipt = {
            key: row[key] for key in ("kind", "auroc", "auroc_low", "auroc_high", "f1", "n_active", "n_inactive")
        }
        return {
            "id": _id(self.model, self.id, dashboard.feature, "explanation", row["label"]),
            **self._of(dashboard),
            "description": row["label"],
            "authorId": self.creator_id,
            "typeName": EXPLANATION_TYPE,
            "explanationModelName": None,
            "notes": json.dumps(receipt, ensure_ascii=False),  # measured on test documents
            "createdAt": self.created,
        }

    def _of(self, dashboard: Dashboard) -> dict[str, str]:
        return {"modelId": self.model, "layer": self.id, "index": str(dashboard.feature)}


def _id(*parts: object) -> str:
    """25 characters, as long as the ids of its database."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_whole(path, gzip.compress(_lines(rows), compresslevel=6, mtime=0))
