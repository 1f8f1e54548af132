"""The wheel holds everything: installed in a clean environment it starts, and finds its templates, SQL and TOML."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # a copy of the tracked tree, so that the build leaves nothing behind
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = files.stdout.split("\n") if files.returncode == 0 else []
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("saeql-*.whl"))


def test_wheel_holds_every_source_and_data_file(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "sae", "store", "pipelines"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"saeql/{path.relative_to(ROOT)}" in inside


def test_installed_wheel_runs_from_a_clean_environment(wheel: Path, tmp_path: Path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    # the dependencies only: a path line does not run the .pth files of that folder, so the editable install stays out
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import saeql.pipelines as p, importlib.resources as r\n"
        "from saeql.pipelines.config import load_config\n"
        "from saeql.store.feature_store import FeatureStore\n"
        "from saeql.pipelines.cli import app\n"
        "assert load_config(None).dictionary.d_sae == 4608\n"
        "assert r.files('saeql.pipelines').joinpath('templates/report.html').is_file()\n"
        "assert any(f.name.endswith('.sql') for f in r.files('saeql.store').joinpath('sql').iterdir())\n"
        "print(p.Run.__module__, p.__file__)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [environment / "bin" / "python", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "saeql.pipelines.run"
    assert str(site) in result.stdout
