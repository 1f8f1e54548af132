"""Configuration: strict keys and types, with the key named and a suggestion."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from saeql.sae.config import ConfigError, DictionaryConfig, TrainConfig, from_dict, load_toml, to_dict


@dataclass(frozen=True)
class Both:
    seed: int = 0
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def test_round_trip_of_every_key():
    config = Both(3, DictionaryConfig(d_sae=64, k=4), TrainConfig(lr=1e-3, adam_betas=(0.8, 0.9)))
    assert from_dict(Both, to_dict(config)) == config


def test_default_then_file_then_override(tmp_path: Path):
    file = tmp_path / "a.toml"
    file.write_text("seed = 1\n[train]\nnum_steps = 7\nbatch_tokens = 16\n")
    config = load_toml(Both, file, {"train.num_steps": "9", "train.lr": "2e-3", "train.b_dec_init": "mean"})
    assert (config.seed, config.train.num_steps, config.train.batch_tokens) == (1, 9, 16)
    assert (config.train.lr, config.train.b_dec_init) == (2e-3, "mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nnum_step = 3\n", 'unknown key "train.num_step".*did you mean "num_steps"'),
        ("[trian]\n", 'unknown key "trian".*did you mean "train"'),
        ("[train]\nnum_steps = 'x'\n", '"train.num_steps" must be a whole number'),
        ("[train]\nnum_steps = true\n", '"train.num_steps" must be a whole number'),
        ("[train]\nadam_betas = [0.9]\n", '"train.adam_betas" must have 2 entries'),
        ("train = 3\n", '"train" must be a section'),
        ("[dictionary]\nk = 0\n", "dictionary.k must lie between 1 and d_sae"),
        ("[dictionary]\nk = 9999\n", "dictionary.k must lie between 1 and d_sae"),
        ("[train]\nb_dec_init = 'median'\n", "train.b_dec_init must be one of"),
        ("[train]\nlr = nan\n", '"train.lr" must be a finite number, got nan'),
        ("[train]\nadam_betas = [0.9, inf]\n", '"train.adam_betas" must be a finite number, got inf'),
        ("[train]\nadam_betas = [0.9, 1.0]\n", "train.adam_betas must lie between 0 and 1"),
        ("[train]\nlr = -1e-3\n", "train.lr must be above 0, got -0.001"),
        ("[train]\nwarmup_steps = -1\n", "train.warmup_steps must be at least 0, got -1"),
        ("[train]\nmax_skipped_share = 2\n", "train.max_skipped_share must lie between 0 and 1, got 2"),
        ("[train\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_toml(Both, file)
    assert "a.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="no configuration file"):
        load_toml(Both, "/nowhere/a.toml")
