"""The configuration of a run: numbers that cannot be meant are refused by the name of their key."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from saeql.pipelines import load_config
from saeql.sae.config import ConfigError

CONFIG = load_config(None)
NUMBERS = [
    (section.name, key.name, type(value))
    for section in fields(CONFIG)
    if is_dataclass(part := getattr(CONFIG, section.name))
    for key in fields(part)
    if isinstance(value := getattr(part, key.name), int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize(("section", "key"), [n[:2] for n in NUMBERS])
def test_a_negative_number_is_refused(section: str, key: str):
    with pytest.raises(ConfigError, match=rf"{key}\b.* -1(\.0)?$"):
        load_config(None, {f"{section}.{key}": "-1"})


@pytest.mark.parametrize(("section", "key"), [n[:2] for n in NUMBERS if n[2] is float])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(section: str, key: str, value: float):
    with pytest.raises(ConfigError, match=rf'"{section}.{key}" must be a finite number, got {value}$'):
        load_config(None, {f"{section}.{key}": str(value)})


def test_the_file_is_named_too(tmp_path: Path):
    (tmp_path / "a.toml").write_text("[index]\nbatch_tokens = 0\n")
    with pytest.raises(ConfigError, match=r"a\.toml: .*index\.batch_tokens must be at least 1, got 0$"):
        load_config(tmp_path / "a.toml")
