"""report.html of a run: gathers the page's data from the store, the training curve and the showcase."""

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from saeql.store.feature_store import FeatureStore

from .metric_table import paired
from .receipts.card import card_lines
from .receipts.headline import headline
from .receipts.token_identity_control import attributes_to_token
from .report import (
    Example,
    FeatureDetail,
    LabelledFeature,
    Metric,
    ReportData,
    SqlExample,
    SteeringExample,
    TrainingPoint,
    write_report,
)
from .showcase import Showcase
from .tracking import read_metrics

if TYPE_CHECKING:
    from .run import Run

REPORT_FILE = "report.html"
MAX_LABEL_ROWS = 1000
NUM_EXAMPLES = 6


def write_run_report(run: "Run", showcase: Showcase) -> None:
    """Write `report.html` of a run whose store is built."""
    with run.store() as store:
        whole = store.receipts(None)
        data = ReportData(
            title=showcase.title,
            facts=_facts(run),
            metrics=[Metric(**asdict(line)) for line in paired(showcase.metrics)],
            training=[
                TrainingPoint(m["step"], m["fvu"], m["dead_share"], m["lr"]) for m in read_metrics(run.metrics_path)
            ],
            densities=store.trusted_sql("SELECT density FROM features ORDER BY feature")["density"]
            .to_numpy()
            .astype(np.float64),
            label_counts=showcase.label_counts,
            labels=_labels(store),
            features=[_detail(store, row, whole) for row in showcase.features],
            rows_left_out=_rows_left_out(run, showcase),
            sql=SqlExample(**showcase.sql),
            steering=[_steering(showcase.steering)] if showcase.steering else [],
            headline=headline(whole).text,
            controls=card_lines(whole),
            timings=[(stage, record["seconds"]) for stage, record in run.finished().items()],
        )
    write_report(run.path / REPORT_FILE, data)


def _facts(run: "Run") -> list[tuple[str, str]]:
    config, info, spec = run.config, run.harvest_info, run.spec
    width = " + ".join(str(info.widths[name]) for name in spec.reads)
    return [
        ("model", info.identity.model_name),
        ("model sha256", info.identity.model_sha256),
        ("tokenizer sha256", info.identity.tokenizer_sha256),
        ("hook point", " + ".join(spec.reads)),
        ("activations", f"{width} wide, {info.dtype}, windows of {info.context_tokens} tokens"),
        ("text", config.corpus.title),
        ("documents left out", _documents_left_out(info.text)),
        ("windows", f"bos {config.corpus.bos}, separator {config.corpus.separator}, packed {config.corpus.pack}"),
        ("dictionary", f"{config.dictionary.architecture}, d_sae {config.dictionary.d_sae}, k {config.dictionary.k}"),
        ("training", f"{config.train.num_steps} steps of {config.train.batch_tokens} tokens, seed {config.seed}"),
    ]


def _documents_left_out(text: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for source in text.get("sources", ()):
        counts.update({**source["left_out"], "cut": source["num_cut"]})
    return ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in counts.items())


def _labels(store: FeatureStore) -> list[LabelledFeature]:
    query = """
        SELECT feature, label, kind, auroc, auroc_low, auroc_high, n_active, density FROM features
        WHERE kind != 'none' ORDER BY auroc_low DESC, feature LIMIT $num
    """
    return [LabelledFeature(*row.values()) for row in store.trusted_sql(query, {"num": MAX_LABEL_ROWS}).to_pylist()]


def _detail(store: FeatureStore, row: dict[str, Any], whole: list[dict[str, Any]]) -> FeatureDetail:
    examples = [
        Example(e.title or f"document {e.document_id}", e.tokens, e.activations)
        for e in store.examples(row["feature"], limit=NUM_EXAMPLES)
    ]
    receipts = store.receipts(row["feature"])
    by_token = attributes_to_token([*receipts, *whole], row["feature"]) is not False
    return FeatureDetail(
        row["feature"], row["label"], row["promotes"], row["suppresses"], examples, card_lines(receipts), by_token
    )


def _rows_left_out(run: "Run", showcase: Showcase) -> list[tuple[str, int]]:
    total = {key: sum(r[key] for r in showcase.rows) for key in showcase.rows[0] if key.startswith("num_")}
    multiple = run.harvest_info.massive_norm_multiple
    return [
        ("all rows", total["num_rows"]),
        ("first positions of windows", total["num_first_position_rows"]),
        (f"rows with a norm above {multiple:g} x the median", total["num_massive_rows"]),
        ("tokens of incomplete last windows", run.harvest_info.num_dropped_tail_tokens),
    ]


def _steering(example: dict[str, Any]) -> SteeringExample:
    names = ("prompt", "baseline", "steered", "feature", "label", "strength")
    return SteeringExample(**{name: example[name] for name in names})
