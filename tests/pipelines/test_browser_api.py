"""The API keeps to its own description, whatever it is asked."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from browser_server import TOKEN, Browser, served
from hypothesis import HealthCheck, assume, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

#: What no answer may be, and what every answer must be. Data that fits the description may still be refused: a feature
#: that there is not, a statement that is no SQL.
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]

EVERY_HEALTH_CHECK: Any = list(HealthCheck)


@pytest.fixture(scope="module")
def browser(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("api") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    with served(folder / "features.duckdb", folder, new_tokens=4) as found:
        found.ask("/api/v1/prompt", {"text": "the"}, token=True)  # what is loaded once takes its time
        yield found


def readable(browser: Browser, body: Any) -> bool:
    """Whether the tiny model has an embedding of every token: its tokenizer has two more."""
    text = body.get("text", body.get("prompt", "")) if isinstance(body, dict) else ""
    lm = browser.site.models.run().language_model
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else []
    return all(i < lm.model.config.vocab_size for i in ids)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_answers_are_as_described(browser: Browser, mode: GenerationMode) -> None:
    refusals = {"expected-statuses": [400, 401, 403, 404, 413, 422]}  # 413 where what is wrong is its size
    config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": refusals}})
    description = schemathesis.openapi.from_url(f"{browser.url}/api/v1/openapi.json", config=config)
    asked = []
    for found in description.get_all_operations():
        operation: Any = found.ok()  # pyright: ignore[reportAttributeAccessIssue]

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=EVERY_HEALTH_CHECK)
        def ask(case: Any) -> None:
            assume(readable(browser, case.body))
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, checks=CHECKS)

        try:
            ask()
        except Unsatisfiable:  # nothing can be asked wrongly where nothing is asked
            assert mode == GenerationMode.NEGATIVE and operation.path.endswith("/dictionaries")
        asked.append(operation.label)
    assert len(asked) == 8


def test_description_names_everything(browser: Browser) -> None:
    found = browser.ask("/api/v1/openapi.json").json
    paths = {path.removeprefix("/api/v1") for path in found["paths"]}
    reading = {"/dictionaries", "/metrics", "/features", "/features/{index}"}
    assert paths == reading | {"/sql", "/prompt", "/steer", "/doses"}
    for path, ways in found["paths"].items():
        for way in ways.values():
            assert way["summary"] and {"400", "401", "413", "429"} <= set(way["responses"])
            assert ("security" in way) == (path.removeprefix("/api/v1") not in reading), path
    keys = set(found["components"]["schemas"]["FeatureOut"]["properties"])
    exported = {"modelId", "layer", "index", "hookName", "maxActApprox", "frac_nonzero", "pos_str", "pos_values",
                "neg_str", "neg_values", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "topkCosSimIndices",
                "topkCosSimValues"}  # fmt: skip
    assert exported <= keys
