"""Dictionaries are compared: who has the same features, against chance."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saeql.pipelines import Run, matching
from saeql.pipelines.cli import main
from saeql.pipelines.compare import compare, find_compared
from saeql.pipelines.matching import LatentRows, match, nearest_rows, null_cosines
from saeql.sae.architectures import build
from saeql.sae.config import ConfigError, DictionaryConfig
from saeql.sae.files import load_dictionary, save_density, save_dictionary
from saeql.store.feature_store import FeatureStore

D = 24


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def noisy(base: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(base + size * rows(len(base), seed), dim=1)


def write(folder, decoder: torch.Tensor, encoder: torch.Tensor | None = None, density=None) -> str:
    made = build(DictionaryConfig(architecture="topk", d_sae=len(decoder), k=4), D, D, seed=0)
    with torch.no_grad():
        made.W_dec.copy_(decoder)
        made.W_enc.copy_(decoder if encoder is None else encoder)
    save_dictionary(made, folder)
    if density is not None:
        save_density(folder, density)
    return str(folder)


@pytest.mark.parametrize("method", ["hungarian", "mutual_nearest"])
def test_a_permuted_copy_is_found_again(method):
    base, order = rows(60), torch.randperm(60, generator=torch.Generator().manual_seed(3))
    found = match(LatentRows.of(base * 3, base), LatentRows.of(noisy(base, 0.1, 9)[order], base[order] * 0.2), method)
    inverse = torch.argsort(order).numpy()
    assert (found.partner == inverse).all() and found.encoder_agrees.all() and found.shared(0.7).all()
    expected = (base * noisy(base, 0.1, 9)).sum(1).numpy()
    np.testing.assert_allclose(found.decoder_cosine, expected, atol=1e-6)
    np.testing.assert_allclose(found.encoder_cosine, 1, atol=1e-6)


def test_the_assignment_has_the_largest_sum_and_is_one_to_one():
    a, b = rows(40, 1), rows(55, 2)
    found = match(LatentRows.of(a, a), LatentRows.of(b, b), "hungarian")
    mine, other = linear_sum_assignment((-a @ b.T).numpy())
    assert len(set(found.partner.tolist())) == 40 and (found.partner[mine] == other).all()


def test_an_encoder_that_disagrees_is_not_shared():
    base = rows(30)
    swapped = base[[1, 0, *range(2, 30)]]
    found = match(LatentRows.of(base, base), LatentRows.of(base, swapped))
    assert not found.shared(0.7)[:2].any() and found.shared(0.7)[2:].all()
    assert (found.decoder_cosine[:2] > 0.99).all()


def test_nearest_rows_does_not_depend_on_the_block(monkeypatch):
    a, b = rows(37, 1), rows(53, 2)
    whole = nearest_rows(a, b)
    monkeypatch.setattr(matching, "BLOCK_COSINES", 53 * 5)
    for one, other in zip(whole, nearest_rows(a, b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    cosines = a @ b.T
    assert (whole[0] == cosines.argmax(1).numpy()).all() and (whole[2] == cosines.argmax(0).numpy()).all()


def test_chance_is_what_theory_says_and_rises_with_shared_covariance():
    generator = torch.Generator().manual_seed(5)
    squeeze = torch.diag(torch.linspace(2, 0.02, 256))
    decoder = torch.nn.functional.normalize(torch.randn(2000, 256, generator=generator) @ squeeze, dim=1)
    isotropic = null_cosines(decoder, decoder, "isotropic").mean()
    assert isotropic == pytest.approx(math.sqrt(2 * math.log(2000) / 256), rel=0.15)
    assert null_cosines(decoder, decoder, "covariance").mean() > 1.2 * isotropic
    few = decoder[:40]  # fewer rows than coordinates
    assert null_cosines(few, few, "covariance").shape == (40,)


def test_stability_and_first_seen_follow_the_order(tmp_path):
    early, late = rows(50, 1), rows(50, 1).clone()
    late[25:] = rows(25, 7)  # learned later
    last = noisy(late, 0.05, 8)
    sources = [write(tmp_path / n, w) for n, w in (("step100", early), ("step200", late), ("step300", last))]
    table = compare(find_compared(sources)).features.to_pandas().set_index(["dictionary", "feature"])
    final = table.loc["step300"]
    assert (final.first_seen[:25] == "step100").all() and (final.first_seen[25:] == "step200").all()
    assert (final.num_shared[:25] == 2).all() and (final.stability[25:] == 0.5).all()
    assert (table.loc["step100"].first_seen == "step100").all()


def test_splitting_names_the_children_of_a_feature(tmp_path):
    narrow = rows(20, 1)
    wide = torch.cat([noisy(narrow, 0.2, 2), noisy(narrow[:6], 0.2, 3), rows(14, 11)])
    result = compare(
        find_compared([write(tmp_path / "narrow", narrow), write(tmp_path / "wide", wide)]), split_cosine=0.9
    )
    split = result.pairs[0].summary["splitting"]
    assert (split["wider"], split["num_split"], split["num_kept"], split["num_gone"]) == ("wide", 6, 14, 0)
    assert split["num_new"] == 14
    children = result.splitting.to_pandas()
    assert set(children[children.feature == 2].child) == {2, 22} and (children.dictionary == "narrow").all()


def test_the_command_writes_page_and_tables(tmp_path, capsys):
    density = torch.linspace(0, 0.1, 30)
    one = write(tmp_path / "a" / "same", rows(30, 1), density=density)
    two = write(tmp_path / "b" / "same", noisy(rows(30, 1), 0.1, 2))
    main(["compare", one, two, "--out", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [d["dictionary"] for d in found["dictionaries"]] == ["a/same", "b/same"]
    assert found["pairs"][0]["num_shared"] == 30 and found["pairs"][0]["shared_share_of_alive"] == 1
    assert found == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "<h2>Stability</h2>" in (tmp_path / "out" / "comparison.html").read_text()
    features = pq.read_table(tmp_path / "out" / "features.parquet").to_pandas()
    np.testing.assert_allclose(features[features.dictionary == "a/same"].density, density, atol=1e-7)
    assert pq.read_table(tmp_path / "out" / "matches.parquet").num_rows == 30
    main(["compare", one, two])
    assert "100.0%" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(tmp_path):
    one = write(tmp_path / "one", rows(10))
    other = build(DictionaryConfig(architecture="topk", d_sae=8, k=2), 12, 12, seed=0)
    save_dictionary(other, tmp_path / "other")
    with pytest.raises(ConfigError, match="at least two"):
        find_compared([one])
    with pytest.raises(ConfigError, match="named twice"):
        find_compared([one, one])
    with pytest.raises(ConfigError, match="24 and 12 coordinates"):
        find_compared([one, str(tmp_path / "other")])
    with pytest.raises(ConfigError, match="shared-cosine"):
        compare(find_compared([one, write(tmp_path / "two", rows(10))]), shared_cosine=0)
    with pytest.raises(ValueError, match="no dictionary 'nowhere'"):
        find_compared([one, "nowhere"])


def changed_copy(run: Path, folder: Path) -> Path:
    """The run's dictionary with a little noise, and the second half of its latents learned anew."""
    made = load_dictionary(Run.open(run).dictionary_path)
    half = made.d_sae // 2
    with torch.no_grad():
        for weights in (made.W_dec, made.W_enc):
            new = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
            weights += 0.01 * weights.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(new, dim=1)
            weights[half:] = new[half:]
    return save_dictionary(made, folder)


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """A run and an earlier dictionary, compared and saved; and the folder of the tables of that comparison."""
    folder = tmp_path_factory.mktemp("saved")
    run = Path(shutil.copytree(tiny_run, folder / "late"))
    early = changed_copy(run, folder / "early")
    main(["compare", str(early), str(run), "--save", "--out", str(folder / "out")])
    return run, folder / "out"


def test_a_saved_comparison_is_asked_in_sql(saved, capsys):
    run, out = saved
    capsys.readouterr()
    main(["sql", str(run), "SELECT feature, stability, first_seen FROM features ORDER BY feature", "--json"])
    found = json.loads(capsys.readouterr().out)
    table = pq.read_table(out / "features.parquet").to_pandas()
    wanted = table[table.dictionary == "late"]
    assert [row["stability"] for row in found] == wanted.stability.tolist()
    assert [row["first_seen"] for row in found] == wanted.first_seen.tolist()
    half = len(found) // 2
    assert {row["first_seen"] for row in found[:half]} == {"early"}
    assert {row["first_seen"] for row in found[half:]} == {"late"}
    name = Run.open(run).spec.name
    with Run.open(run).store() as store:
        pairs = store.sql("SELECT * EXCLUDE (dictionary) FROM matches ORDER BY feature").to_pylist()
        row = store.sql("SELECT * FROM stability WHERE feature = 0").to_pylist()[0]
        assert store.sql("SELECT DISTINCT dictionary FROM matches")["dictionary"].to_pylist() == [name]
        assert store.feature(0)["stability"] == 1
    assert (row["dictionary"], row["compared_as"], row["compared"]) == (name, "late", ["early", "late"])
    wanted = pq.read_table(out / "matches.parquet").to_pylist()  # written the other way round
    assert {(p["other_feature"], p["feature"], p["decoder_cosine"], p["shared"]) for p in pairs} == {
        (p["feature"], p["other_feature"], p["decoder_cosine"], p["shared"]) for p in wanted
    }
    assert {p["other_dictionary"] for p in pairs} == {"early"} and len(pairs) == len(wanted)
    assert Run.open(run).verify().damage == []


def test_saving_again_replaces_and_training_again_forgets(saved, tmp_path):
    run = Path(shutil.copytree(saved[0], tmp_path / "mine"))
    twin = Path(shutil.copytree(run, tmp_path / "twin"))
    main(["compare", str(run), f"{twin}:{Run.open(twin).spec.name}", "--save"])
    for place in (run, twin):
        with Run.open(place).store() as store:
            (row,) = store.sql("SELECT DISTINCT num_compared, stability, compared FROM stability").to_pylist()
            assert (row["num_compared"], row["stability"]) == (1, 1) and len(row["compared"]) == 2
            assert store.sql("FROM matches").num_rows == 96
    main(["train", str(run)])
    assert not any(Run.open(run).evidence.has(table) for table in ("stability", "matches"))
    for stage in ("index", "label", "evaluate", "store"):
        main([stage, str(run)])
    with Run.open(run).store() as store:
        assert store.sql("SELECT count(stability) AS n FROM features")["n"].to_pylist() == [0]
        assert store.sql("FROM matches").num_rows == 0
    assert Run.open(run).verify().damage == []


def test_a_shared_store_has_the_comparison(saved, tmp_path):
    run, _ = saved
    main(["export", str(run), str(tmp_path / "shared"), "--format", "parquet"])
    main(["import", str(tmp_path / "shared"), str(tmp_path / "mine"), "--format", "parquet"])
    with FeatureStore.open(tmp_path / "mine" / "features.duckdb") as mine, Run.open(run).store() as theirs:
        for view in ("stability", "matches"):
            found = mine.sql(f"SELECT * FROM {view} ORDER BY ALL")
            assert found.num_rows > 0 and found.equals(theirs.sql(f"SELECT * FROM {view} ORDER BY ALL"))


def test_saving_where_it_cannot_be_is_one_line(saved, tmp_path, capsys):
    run, _ = saved
    one, two = write(tmp_path / "one", rows(10)), write(tmp_path / "two", rows(10))
    with pytest.raises(SystemExit):
        main(["compare", one, two, "--save"])
    assert "none of the sources is a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="named twice"):
        find_compared([str(run), f"{run}:{Run.open(run).spec.name}"])
    with Run.open(run).locked():
        with pytest.raises(SystemExit):
            main(["compare", str(run), str(run.parent / "early"), "--save"])
        assert "pid" in capsys.readouterr().err
