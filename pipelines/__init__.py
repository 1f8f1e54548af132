"""The public Python face of saeql: `from saeql.pipelines import Run, load_config, ...`.

Names are imported on first use, so that `saeql --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saeql.sae.files import load_dictionary, save_dictionary
    from saeql.sae.hooks import capture, edit
    from saeql.sae.model import SparseAutoencoder
    from saeql.store.feature_store import FeatureStore

    from .config import RunConfig, load_config
    from .guarding.guard import Guard
    from .models import LanguageModel, ModelConfig, load_model
    from .run import STAGES, Run, RunError
    from .steering.edits import Edit
    from .steering.steerer import Steerer

_HOMES = {
    "Edit": ".steering.edits",
    "FeatureStore": "saeql.store.feature_store",
    "Guard": ".guarding.guard",
    "LanguageModel": ".models",
    "ModelConfig": ".models",
    "Run": ".run",
    "RunConfig": ".config",
    "RunError": ".run",
    "STAGES": ".run",
    "SparseAutoencoder": "saeql.sae.model",
    "Steerer": ".steering.steerer",
    "capture": "saeql.sae.hooks",
    "edit": "saeql.sae.hooks",
    "load_config": ".config",
    "load_dictionary": "saeql.sae.files",
    "save_dictionary": "saeql.sae.files",
    "load_model": ".models",
}

__all__ = [
    "STAGES",
    "Edit",
    "FeatureStore",
    "Guard",
    "LanguageModel",
    "ModelConfig",
    "Run",
    "RunConfig",
    "RunError",
    "SparseAutoencoder",
    "Steerer",
    "capture",
    "edit",
    "load_config",
    "load_dictionary",
    "load_model",
    "save_dictionary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
