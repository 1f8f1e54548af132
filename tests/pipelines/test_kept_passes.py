"""Passes of a study of effects that was stopped: found again, the same, and never taken for others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.output_effects import WritePlace, direction_effects
from saeql.pipelines.steering import kept_passes
from saeql.pipelines.steering.kept_passes import KeptPasses

HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def place(tiny_run: Path) -> WritePlace:
    return WritePlace(Run.open(tiny_run).language_model, {HOOK: 32}, {HOOK: 0.7})


@pytest.fixture(scope="module")
def windows(tiny_run: Path) -> np.ndarray:
    return np.array(Run.open(tiny_run).evidence.read("windows", split="test")["token_ids"].to_pylist()[:3], np.int32)[
        :, :8
    ]


def test_groups_are_one_measurement_and_go_on_where_it_stopped(
    place: WritePlace, windows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(kept_passes, "GROUP", 3)
    rows, strengths = place.random_directions(7, 1), [0.5, -2.0, 0.1, 0.2, 0.3, 0.4, 0.6]
    whole = direction_effects(place, rows, windows, [[5], [7, 9]], strength=strengths, batch_windows=2)
    calls: list[int] = []

    def counted(place: WritePlace, directions: torch.Tensor, *args: object, **keys: object):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(directions))
        return direction_effects(place, directions, *args, **keys)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(kept_passes, "direction_effects", counted)

    def measured(place: WritePlace = place, sets: list[list[int]] | None = None):
        told: list[tuple[int, int]] = []
        kept = KeptPasses(tmp_path / "parts")
        found = kept.effects(
            place, rows, windows, sets or [[5], [7, 9]], strength=strengths, batch_windows=2,
            on_progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        return found, told

    with pytest.raises(KeyboardInterrupt):
        measured()
    assert calls == [3, 3] and "going on" not in capsys.readouterr().err
    calls.clear()
    found, told = measured()
    assert calls == [1] and told[-1] == (14, 14)  # what was there is not measured again
    assert capsys.readouterr().err.count("going on behind what") == 1
    for name in ("shifts", "kl", "ce"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    calls.clear()
    (tmp_path / "parts" / sorted(f.name for f in (tmp_path / "parts").iterdir())[0]).write_bytes(b"half a fi")
    measured()
    assert len(calls) == 1  # a damaged part is measured again
    longer = replace(place, median_norms={HOOK: 0.8})
    for other in (lambda: measured(sets=[[5], [7, 8]]), lambda: measured(longer)):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            other()
        assert calls == [3, 3]  # other words, another length: nothing is taken over
    KeptPasses(tmp_path / "parts").remove()
    assert not (tmp_path / "parts").exists()


def test_without_a_folder_nothing_is_kept(place: WritePlace, windows: np.ndarray):
    found = KeptPasses().effects(place, place.random_directions(2, 0), windows, [[5]], strength=0.0)
    assert found.shifts.shape == (2, 1, 3) and (found.kl == 0).all()
