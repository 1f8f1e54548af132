"""SAEDashboard's JSON: `batch-N.json` with the keys of its dashboards (decoderesearch/SAEDashboard 0.8).

Correlations with neurons and other features are not measured and stay empty.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeql.sae.hook_points import resolve

from .atomic import write_whole
from .dashboards import Dashboard, Sequence, dashboards

if TYPE_CHECKING:
    from .run import Run

BATCH_FEATURES = 128
_DECIMALS = 5


def export_saedashboard(run: "Run", folder: Path) -> Path:
    """Write every feature of a run. Raises StoreError before the store is built."""
    folder.mkdir(parents=True, exist_ok=True)
    about = source_names(run)
    shared = {
        "n_prompts_total": about["num_windows"],
        "n_tokens_in_prompt": run.harvest_info.context_tokens,
        "dataset": run.config.corpus.title,
    }
    for n, batch in enumerate(dashboards(run, BATCH_FEATURES)):
        page = {
            "model_id": about["model_id"],
            "layer": about["layer"],
            "sae_set": about["sae_set"],
            "features": [{**_feature(dashboard), **shared} for dashboard in batch],
        }
        write_whole(folder / f"batch-{n}.json", json.dumps(page, ensure_ascii=False, allow_nan=False))
    return folder


def source_names(run: "Run") -> dict[str, Any]:
    """Model, layer and name of the set, as dashboards name a dictionary, and the windows that were read on train."""
    rows = run.evidence.read("split_rows").to_pylist()
    identity = run.harvest_info.identity.at(run.spec.reads)
    return {
        "model_id": identity.model_name.rsplit("/", 1)[-1].rsplit(":", 1)[-1],
        "layer": resolve(run.language_model.model, run.spec.writes[-1]).layer,
        "sae_set": run.spec.name.replace("_", "-"),
        "num_windows": next(row["num_windows"] for row in rows if row["split"] == "train"),
    }


def _feature(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "feature_index": dashboard.feature,
        **measured(dashboard),
        "vector": dashboard.vector,
        "activations": [_activation(sequence) for sequence in dashboard.sequences],
    }


def measured(dashboard: Dashboard) -> dict[str, Any]:
    """The keys of a feature that Neuronpedia's format has too."""
    coordinates, values, shares = (list(column) for column in zip(*dashboard.aligned, strict=True))
    return {
        "neuron_alignment_indices": coordinates,
        "neuron_alignment_values": rounded(values),
        "neuron_alignment_l1": rounded(shares),
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": [],
        "correlated_features_pearson": [],
        "correlated_features_l1": [],
        "neg_str": [token for token, _ in dashboard.suppressed],
        "neg_values": rounded([effect for _, effect in dashboard.suppressed]),
        "pos_str": [token for token, _ in dashboard.promoted],
        "pos_values": rounded([effect for _, effect in dashboard.promoted]),
        "frac_nonzero": dashboard.row["density"],
        "freq_hist_data_bar_values": rounded(dashboard.activations.centres),
        "freq_hist_data_bar_heights": dashboard.activations.counts,
        "logits_hist_data_bar_heights": dashboard.logits.counts,
        "logits_hist_data_bar_values": rounded(dashboard.logits.centres),
        "decoder_weights_dist": [],
    }


def bin_of(sequence: Sequence) -> tuple[float, float, float]:
    """Smallest and largest activation of the group, and its share; the strongest are -1, their largest, -1."""
    if sequence.decile is None:
        return -1, sequence.high, -1
    return sequence.low, sequence.high, 0.1


def rounded(values: list[float]) -> list[float]:
    """Numbers with as many decimals as the format keeps."""
    return [round(float(value), _DECIMALS) for value in values]


def _activation(sequence: Sequence) -> dict[str, Any]:
    low, high, share = bin_of(sequence)
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": sequence.tokens,
        "values": rounded(sequence.activations),
        "qualifying_token_index": sequence.focus,
    }
