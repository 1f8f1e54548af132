"""What a run shows of itself when it is done: the final screen, and the data of report.html.

`make_showcase` asks the feature store and the model once and writes `showcase.json`; a finished run prints it again
without either.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from saeql.store.feature_store import Example, FeatureStore

from .atomic import write_whole
from .metric_table import print_metrics
from .output import console, highlighted, print_records, print_steering, visible
from .progress import progress
from .steering.edits import Edit
from .steering.steerer import Steerer

if TYPE_CHECKING:
    from .run import Run

SHOWCASE_FILE = "showcase.json"
PROMPT = "The most interesting thing about it is"
STRENGTH = 0.4
NUM_FEATURES = 10
NUM_STEERING_CANDIDATES = 8

SQL_EXAMPLE = """SELECT feature, label, round(auroc, 3) AS auroc, n_active, density, promotes[1:4] AS promotes
FROM features
WHERE kind = 'structural' AND auroc_low > 0.8 AND n_active >= 30
ORDER BY f1 DESC
LIMIT 5"""


@dataclass(frozen=True)
class Showcase:
    """Plain data of the final screen. `metrics` are rows of the view metrics ."""

    title: str
    metrics: list[dict[str, Any]]
    label_counts: dict[str, int]
    features: list[dict[str, Any]]  # rows of the view features, each with one example
    sql: dict[str, Any]  # query, columns, rows
    steering: dict[str, Any] | None  # None for an encoder; feature, label, mode, strength, prompt, baseline, steered
    rows: list[dict[str, Any]]  # rows kept and left out, by split

    def save(self, folder: Path) -> None:
        """Write `showcase.json`."""
        write_whole(folder / SHOWCASE_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Showcase":
        """Read `showcase.json`."""
        return cls(**json.loads((folder / SHOWCASE_FILE).read_text(encoding="utf-8")))


def make_showcase(run: "Run") -> Showcase:
    """Ask the store and the model for everything that the final screen shows, and keep it in the run."""
    identity = run.harvest_info.identity
    with run.store() as store:
        features = [
            {**row, "example": asdict(store.examples(row["feature"], limit=1)[0])} for row in chosen_features(store)
        ]
        table = store.trusted_sql(SQL_EXAMPLE)
        counts = store.trusted_sql("SELECT kind, count(*) AS n FROM features GROUP BY kind ORDER BY n DESC")
        showcase = Showcase(
            title=f"{run.spec.name} of {identity.model_name} at {' + '.join(run.spec.reads)}",
            metrics=store.metrics(run.spec.name),
            label_counts=dict(zip(counts["kind"].to_pylist(), counts["n"].to_pylist(), strict=True)),
            features=features,
            sql={
                "query": SQL_EXAMPLE,
                "columns": table.column_names,
                "rows": [list(row.values()) for row in table.to_pylist()],
            },
            steering=steering_example(store, run.steerer()) if run.language_model.is_causal else None,
            rows=run.evidence.read("split_rows").to_pylist(),
        )
    showcase.save(run.path)
    return showcase


def chosen_features(store: FeatureStore, num: int = NUM_FEATURES) -> list[dict[str, Any]]:
    """Labelled features that score best among those whose labels begin alike ("word", "token", "words", "a", ...)."""
    query = """
        SELECT * EXCLUDE (place) FROM (
            SELECT *, row_number() OVER (PARTITION BY kind, split_part(label, ' ', 1)
                                         ORDER BY f1 DESC, feature) AS place
            FROM (FROM features WHERE kind != 'none' AND n_active >= 30
                  QUALIFY row_number() OVER (PARTITION BY label ORDER BY f1 DESC, feature) = 1))
        ORDER BY place, f1 DESC LIMIT $num
    """
    return store.trusted_sql(query, {"num": num}).to_pylist()


def steering_example(store: FeatureStore, steerer: Steerer) -> dict[str, Any]:
    """A prompt continued with and without a feature.

    Of the features whose promoted tokens hold a word of their own label, the few with the strongest logit effect are
    tried, and the one that brings most of its promoted tokens into the text is shown: the clearest, not a typical one.
    """
    query = """
        SELECT f.feature, f.label, f.promotes, max(e.effect) AS effect FROM features f
        JOIN logit_effects e ON e.dictionary = f.dictionary AND e.feature = f.feature AND e.direction = 'promoted'
        WHERE f.kind = 'lexical' AND f.auroc_low > 0.6 AND f.density < 0.01
          AND len([t FOR t IN f.promotes IF len(trim(t)) > 4 AND contains(lower(f.label), lower(trim(t)))]) > 0
        GROUP BY ALL ORDER BY effect DESC, f.feature LIMIT $num
    """
    candidates = store.trusted_sql(query, {"num": NUM_STEERING_CANDIDATES}).to_pylist()
    if not candidates:
        query = (
            "SELECT feature, label, promotes FROM features WHERE num_documents > 0 ORDER BY max_activation DESC LIMIT 1"
        )
        candidates = store.trusted_sql(query).to_pylist()
    tried = []
    with progress("report", 1 + len(candidates), "texts") as advance:
        baseline = steerer.generate(PROMPT, [])
        advance(1)
        for row in candidates:
            text = steerer.generate(PROMPT, [Edit(row["feature"], "add", STRENGTH)])
            words = {t.strip().lower() for t in row["promotes"]} - {""}
            tried.append((sum(w in text.lower() for w in words) - sum(w in baseline.lower() for w in words), text, row))
            advance(1)
    _, steered, row = max(tried, key=lambda item: item[0])
    return {
        "feature": row["feature"],
        "label": row["label"],
        "mode": "add",
        "strength": STRENGTH,
        "prompt": PROMPT,
        "baseline": baseline,
        "steered": steered,
        "num_tried": len(candidates),
    }


def print_showcase(run: "Run") -> None:
    """Print the final screen of a finished run."""
    shown, out = Showcase.load(run.path), console()
    out.print()
    out.print(Panel(Text(shown.title, "bold"), expand=False))
    print_metrics(shown.metrics)
    left_out = sum(r["num_massive_rows"] for r in shown.rows), sum(r["num_first_position_rows"] for r in shown.rows)
    out.print(Text(f"left out: {left_out[0]} massive-norm rows, {left_out[1]} first positions of windows", "dim"))
    counts = ", ".join(f"{n} {'unexplained' if kind == 'none' else kind}" for kind, n in shown.label_counts.items())
    out.print(Text(f"\n{NUM_FEATURES} labelled features of {sum(shown.label_counts.values())} ({counts})", "bold"))
    for row in shown.features:
        text = f"{row['feature']:>6}  {visible(row['label']):<44.44} AUROC {row['auroc']:.3f} (n {row['n_active']})  "
        out.print(
            Text(text).append_text(highlighted(_narrow(Example(**row["example"])))), overflow="ellipsis", no_wrap=True
        )
    out.print(Text("\nasked in SQL", "bold"))
    out.print(Text(shown.sql["query"], "cyan"))
    print_records(shown.sql["columns"], shown.sql["rows"], "table")
    change = shown.steering
    if change:
        out.print(Text(f"\nsteered with feature {change['feature']}: {visible(change['label'])}", "bold"))
        edit = Edit(change["feature"], change["mode"], change["strength"])
        print_steering([edit], [change["prompt"]], [change["baseline"]], [change["steered"]])
    out.print(Text("\nwhere everything lies", "bold"))
    for name, path in _places(run).items():
        out.print(Text(f"  {name:<12} {path}"))
    out.print(Text("\ngo on with"))
    feature = change["feature"] if change else 0
    steer = f'saeql steer {run.path} --feature {feature} --strength 0.3 --prompt "I think that"'
    for line in (
        f'saeql search {run.path} "music"',
        f"saeql show {run.path} {feature}",
        f'saeql sql {run.path} "SELECT * FROM dictionaries"',
        *([steer] if change else []),
    ):
        out.print(Text(f"  {line}", "cyan"))


def _narrow(example: Example, before: int = 6, after: int = 4) -> Example:
    """The same example with fewer tokens around its peak."""
    start = max(0, example.focus - 1 - before)
    stop = example.focus + after
    return Example(
        **{
            **asdict(example),
            "tokens": example.tokens[start:stop],
            "activations": example.activations[start:stop],
            "focus": example.focus - start,
        }
    )


def _places(run: "Run") -> dict[str, Path]:
    return {
        "dictionary": run.dictionary_path,
        "store": run.path / "features.duckdb",
        "evidence": run.path / "evidence",
        "curve": run.path / "metrics.jsonl",
        "report": run.path / "report.html",
    }
