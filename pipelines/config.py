"""The configuration of a run: one section a component, and the reference that documents every key."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from saeql.sae.config import DictionaryConfig, TrainConfig, load_toml, to_dict

from .corpus import EMBEDDED_TEXT, CorpusConfig, SourceConfig
from .embedder import EmbedderConfig
from .evaluate import EvaluateConfig
from .explainers.ngrams import NGramsConfig
from .explainers.output import OutputConfig
from .harvest import HarvestConfig
from .index import IndexConfig
from .label_config import LabelConfig
from .language_models.config import JudgeConfig
from .models import ModelConfig
from .receipts.intervention import InterventionConfig
from .sweep import SweepConfig
from .token_identity import TokensConfig

#: Tokens of the train split that are stored to gather evidence on where training reads the model itself.
LIVE_TRAIN_TOKENS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    seed: int = 0
    """Seed of initialisation, shuffling and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    ngrams: NGramsConfig = field(default_factory=NGramsConfig)
    output_labels: OutputConfig = field(default_factory=OutputConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    token_identity: TokensConfig = field(default_factory=TokensConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def stored_train_tokens(self) -> int:
        """Most tokens of the train split that the harvest stores; 0: all."""
        if self.harvest.max_train_tokens is not None:
            return self.harvest.max_train_tokens
        return LIVE_TRAIN_TOKENS if self.train.source == "live" else 0


def load_config(path: str | Path | None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a run's configuration from TOML (None: the packaged demo) with overrides such as `{"train.lr": "1e-3"}`.

    Raises ConfigError naming the key.
    """
    return load_toml(RunConfig, demo_config_path() if path is None else path, overrides)


def with_text(config: RunConfig, texts: Sequence[str | Path]) -> RunConfig:
    """`config` with files, folders or hub datasets as further sources of its corpus, each of weight 1."""
    if not texts:
        return config
    added = tuple(SourceConfig(source=str(text)) for text in texts)
    corpus = replace(config.corpus, source=EMBEDDED_TEXT, mixture=(*config.corpus.sources, *added))
    return replace(config, corpus=corpus)


def demo_config_path() -> Path:
    """The packaged configuration of `saeql demo`."""
    return Path(str(files("saeql.pipelines").joinpath("configs/demo.toml")))


def to_toml(config: RunConfig) -> str:
    """TOML text of a resolved configuration."""
    return tomli_w.dumps(to_dict(config))


def reference(config: RunConfig | None = None) -> str:
    """TOML of every key with its default and, as a comment, what it means."""
    config = config or RunConfig()
    lines = [*_documented(config), ""]
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            summary = (inspect.getdoc(type(value)) or "").splitlines()[0]
            lines += [f"[{section.name}]  # {summary}", *_documented(value), ""]
    return "\n".join(lines)


def _documented(config: Any) -> list[str]:
    docs = _field_docs(type(config))
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            continue
        text = tomli_w.dumps({f.name: list(value) if isinstance(value, tuple) else value}) if value is not None else ""
        text = " ".join(text.split()) or f"# {f.name} = (unset)"
        lines += [f"# {docs.get(f.name, '')}", text]
    return lines


def _field_docs(cls: type) -> dict[str, str]:
    """Text of the string under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            docs[before.target.id] = " ".join(str(after.value.value).split())  # pyright: ignore[reportAttributeAccessIssue]
    return docs
