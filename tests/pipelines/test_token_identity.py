"""Token identity by depth and the masked-token test: exact where the answer is known, else against plain ridge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import ModelConfig, Run, capture, load_model
from saeql.pipelines.cli import main
from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.feature_values import FeatureValues
from saeql.pipelines.masked_token import MaskedEffect, masked_effects
from saeql.pipelines.receipts.control import Labelled
from saeql.pipelines.receipts.receipt import receipts_table
from saeql.pipelines.receipts.token_identity_control import (
    CARD,
    CONTROL,
    MASKED,
    TokenIdentityControl,
    attributes_to_token,
    identity_receipt,
    masked_receipts,
)
from saeql.pipelines.split_rows import read_feature_rows, read_token_ids
from saeql.pipelines.token_identity import (
    PENALTIES,
    PlaceIdentity,
    TokenIdentity,
    TokensConfig,
    hook_points_of,
    token_identity,
)
from saeql.pipelines.token_identity_report import layer_numbers
from saeql.sae.metrics import Estimate

SMALL = TokensConfig(train_tokens=3000, calibration_tokens=300, test_tokens=600, features=12, rows=3, num_bootstrap=50)


def test_the_embedding_is_its_token_and_says_nothing_of_the_neighbours(tiny_run: Path):
    run = Run.open(tiny_run)
    found = token_identity(run.language_model, run.evidence, hook_points_of(run.language_model), SMALL)
    assert [p.hook_point for p in found.places] == ["resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2"]
    first = found.places[0]
    assert first.own.value == 1.0 and first.layer == 0 and first.own.n > 500
    assert first.found["previous"].value < 0.3 and first.found["next"].value < 0.3
    assert all(p.own.low is not None and p.own.low <= p.own.value for p in found.places)
    assert 0 < found.commonest < 0.2 and found.num_types < 60


def test_a_layer_is_what_plain_ridge_gives(tiny_run: Path):
    run = Run.open(tiny_run)
    lm, config = run.language_model, SMALL
    found = token_identity(lm, run.evidence, ["resid_post.1"], config).places[0]
    wanted = {"train": 3000, "calibration": 300, "test": 600}
    data, types = {}, set()
    embedding = lm.model.get_input_embeddings().weight.detach().double().numpy()
    embedding = embedding - embedding.mean(0)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    with torch.no_grad(), capture(lm.model, ["resid_post.1"]) as reader:
        for split, count in wanted.items():
            table = np.array(run.evidence.read("windows", split=split)["token_ids"].to_pylist())
            chosen = np.unique(np.linspace(0, len(table) - 1, min(len(table), -(-count // 32))).round().astype(int))
            acts = reader.run(torch.from_numpy(table[chosen]).long())["resid_post.1"].double().numpy()
            data[split] = acts[:, 1:-1].reshape(-1, 32), table[chosen]
            types |= set(table[chosen].ravel().tolist())
    types = np.array(sorted(types))
    for target, shift in (("own", 0), ("previous", -1), ("next", 1)):

        def tokens(split: str, shift: int = shift) -> np.ndarray:
            ids = data[split][1]
            return ids[:, 1 + shift : ids.shape[1] - 1 + shift].ravel()

        x, y = data["train"][0], embedding[tokens("train")]
        centred = x - x.mean(0)
        covariance = centred.T @ centred / len(x)
        scores = []
        for penalty in PENALTIES:
            ridge = covariance + penalty * np.trace(covariance) / 32 * np.eye(32)
            weight = np.linalg.solve(ridge, centred.T @ (y - y.mean(0)) / len(x))

            def share(split: str, weight: np.ndarray = weight, x: np.ndarray = x, y: np.ndarray = y) -> float:
                guess = (data[split][0] - x.mean(0)) @ weight + y.mean(0)
                return float((types[(guess @ embedding[types].T).argmax(1)] == tokens(split)).mean())

            scores.append((share("calibration"), penalty, share("test")))
        assert found.found[target].value == pytest.approx(max(scores)[2], abs=0.01), target


def test_other_places_and_models_are_read_too(tiny_run: Path, tiny_encoder: Path):
    run = Run.open(tiny_run)
    mlp = token_identity(run.language_model, run.evidence, ["mlp_out.1"], SMALL)
    assert mlp.places[0].layer == 1 and mlp.places[0].own.n > 500
    encoder = load_model(ModelConfig(name=str(tiny_encoder), hook_point="resid_post.1", dtype="float32"))
    found = token_identity(encoder, run.evidence, hook_points_of(encoder, [0, 2]), SMALL)
    assert [p.layer for p in found.places] == [0, 2] and found.places[0].own.value > 0.5


def test_replacing_the_own_token_ends_a_feature_of_that_token(token_run: Path):
    run = Run.open(token_run)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25)
    features = [int(f) for f in np.flatnonzero(rows.test.active.counts > 3)][:6]
    with FeatureValues.of(run, 512) as values:
        found = masked_effects(values, rows.test, read_token_ids(run.evidence, rows.test), features, SMALL)
    assert list(found) == features
    for effect in found.values():
        assert len(effect.own) == 3 and (effect.own == 1).all()
        np.testing.assert_allclose(effect.other[~np.isnan(effect.other)], 0, atol=1e-6)


def test_a_token_is_named_where_the_layer_or_the_feature_allows():
    effects = {
        3: MaskedEffect(np.array([0.9, 0.7]), np.array([0.1, np.nan])),
        4: MaskedEffect(np.zeros(2), np.zeros(2)),
    }
    low = masked_receipts(effects, 0.4, SMALL)
    assert [(r.feature, r.verdict, r.detail.get("card")) for r in low] == [(3, "passed", None), (4, "failed", CARD)]
    assert low[0].value == pytest.approx(0.8) and low[0].detail["other_token"] == pytest.approx(0.1) and low[0].n == 2
    assert low[0].low == pytest.approx(0.7) and low[0].high == pytest.approx(0.9)
    assert [r.verdict for r in masked_receipts(effects, 0.95, SMALL)] == ["passed", "passed"]
    rows = [{"control": CONTROL, "feature": None, "verdict": "failed"}]
    rows += [{"control": MASKED, "feature": r.feature, "verdict": r.verdict} for r in low]
    assert [attributes_to_token(rows, f) for f in (3, 4, 5)] == [True, False, False]
    assert attributes_to_token([{**rows[0], "verdict": "passed"}], 5) is True
    assert attributes_to_token([], 3) is None


def test_of_a_crosscoders_places_the_best_counts():
    places = [
        PlaceIdentity(name, 0, {t: Estimate(share, 40, share - 0.1, share) for t in ("own", "previous", "next")})
        for name, share in (("mlp_out.0", 0.3), ("resid_post.0", 0.95), ("resid_post.1", 0.99))
    ]
    found = identity_receipt(TokenIdentity("m", 90, 40, 12, 0.1, places), ("mlp_out.0", "resid_post.0"), SMALL)
    assert (found.value, found.verdict, found.n, found.low) == (0.95, "passed", 40, 0.95 - 0.1)
    assert set(found.detail["hook_points"]) == {"mlp_out.0", "resid_post.0"}
    only = identity_receipt(TokenIdentity("m", 90, 40, 12, 0.1, places), ("mlp_out.0",), SMALL)
    assert only.verdict == "failed" and only.detail["card"] == CARD


def test_the_control_writes_its_receipts(token_run: Path):
    run = Run.open(token_run)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25)
    labels = {int(f): Candidate("x", "lexical", "test") for f in np.flatnonzero(rows.test.active.counts > 0)[:20]}
    whole, *own = TokenIdentityControl(run, SMALL).check(Labelled(run, rows, labels, {}, "full"))
    assert whole.feature is None and whole.value == 1.0 and whole.verdict == "passed" and whole.control == CONTROL
    assert set(whole.detail["hook_points"]) == {"resid_pre.0"} and "card" not in whole.detail
    assert len(own) == 12 and {r.feature for r in own} <= set(labels) and all(r.verdict == "passed" for r in own)
    assert receipts_table("d", [whole, *own]).num_rows == 13


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["tokens", str(tiny_run), "--layers", "0-1", "--train-tokens", "2000", "--test-tokens", "400"]
    main([*arguments, "--features", "5", "--out", str(tmp_path / "out"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [p["hook_point"] for p in printed["places"]] == ["resid_post.0", "resid_post.1"]
    assert len(printed["masked_token"]) == 5 and printed == json.loads(
        (tmp_path / "out/token_identity.json").read_text()
    )
    assert (tmp_path / "out" / "token_identity.png").read_bytes().startswith(b"\x89PNG")
    main([*arguments, "--features", "0", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "resid_post.1 *" in shown and "masking" not in shown


def test_what_it_leaves_in_a_run_has_its_hash(tiny_run: Path, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run, tmp_path / "run"))
    for tokens in ("2000", "1500"):  # the second time other bytes, which are no damage
        main(["tokens", str(run.path), "--layers", "0", "--train-tokens", tokens, "--features", "0"])
        found = run.verify()
        assert found.damage == [] and found.unrecorded == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0,9"], "has no layer 9: its layers are 0 to 2"),
        (["--layers", "3-1"], "write numbers and ranges"),
        (["--layers", "x"], "write numbers and ranges"),
        (["--test-tokens", "0"], "token_identity.test_tokens must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, tiny_run: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tokens", str(tiny_run), "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_ranges_of_layers():
    assert layer_numbers("3, 0-2,1") == [3, 0, 1, 2]
