"""The import rule: arrows only point down, and the two lower floors stay light."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What each folder may import of ours.
ALLOWED = {
    "kernels": {"kernels"},
    "sae": {"sae", "kernels"},
    "store": {"store"},
    "pipelines": {"pipelines", "sae", "store", "kernels"},
}
STANDARD = set(__import__("sys").stdlib_module_names)
THIRD_PARTY = {
    "kernels": {"torch", "triton", "numpy"},
    "sae": {"torch", "triton", "numpy", "safetensors"},
    "store": {"duckdb", "pyarrow", "h5py", "numpy", "scipy", "snowballstemmer"},
}
SOURCES = [(folder, path) for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path, folder: str) -> set[str]:
    """Absolute names of the modules that a file imports, relative ones resolved."""
    package = ["saeql", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, node.module or ""]).strip("."))
    return names


def violations(path: Path, folder: str) -> list[str]:
    found = []
    for name in imported(path, folder):
        parts = name.split(".")
        if parts[0] == "saeql":
            if len(parts) > 1 and parts[1] not in ALLOWED[folder]:
                found.append(f"{name} points up")
        elif parts[0] not in STANDARD and folder in THIRD_PARTY and parts[0] not in THIRD_PARTY[folder]:
            found.append(f"{name} is not among {folder}'s packages")
    return found


@pytest.mark.parametrize(("folder", "path"), SOURCES, ids=lambda v: str(v).removeprefix(f"{ROOT}/"))
def test_imports_point_down(folder: str, path: Path):
    assert violations(path, folder) == []


def test_an_arrow_that_points_up_is_found(monkeypatch: pytest.MonkeyPatch):
    bad = ROOT / "store" / "imaginary.py"
    tree = "from saeql.sae.model import SparseAutoencoder\nimport torch\nfrom ..pipelines import run\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding="utf-8": tree)
    assert sorted(violations(bad, "store")) == [
        "saeql.pipelines points up",
        "saeql.sae.model points up",
        "torch is not among store's packages",
    ]


def test_kernels_is_a_namespace_portion():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would import ours in place of PyPI's kernels"
