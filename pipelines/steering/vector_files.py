"""Files of steering vectors by what their names say: .safetensors, or .gguf for llama.cpp."""

from pathlib import Path

from saeql.sae.hook_points import layer_stack

from ..models import LanguageModel
from .gguf_vectors import load_gguf, save_gguf
from .vectors import SteeringVector, VectorError


def load_vector(path: Path) -> SteeringVector:
    """Read a steering vector. Raises VectorError."""
    return load_gguf(path) if path.suffix == ".gguf" else SteeringVector.load(path)


def check_name(path: Path) -> None:
    """Raises VectorError for a name that says no form, or a folder that is not there: before anything is read."""
    if path.suffix not in (".safetensors", ".gguf"):
        raise VectorError(f"{path}: a steering vector is written as .safetensors or .gguf")
    if not path.parent.is_dir():
        raise VectorError(f"{path} cannot be written: there is no folder {path.parent}")


def save_vector(vector: SteeringVector, path: Path, lm: LanguageModel) -> Path:
    """Write a steering vector; the model says how many layers a GGUF file may name. Raises VectorError."""
    check_name(path)
    if path.suffix == ".gguf":
        model_type = str(lm.model.config.model_type)
        return save_gguf(vector, path, model_type=model_type, num_layers=len(layer_stack(lm.model)[1]))
    return vector.save(path)
