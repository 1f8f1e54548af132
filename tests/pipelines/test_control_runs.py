"""Control runs of a tiny real run: what is switched, what stays bit for bit, what is shared, how they are compared."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saeql.pipelines import Run, RunError, load_config
from saeql.pipelines.cli import main
from saeql.pipelines.control_comparison import compare_controls, control_table, save_receipts
from saeql.pipelines.control_runs import ControlRunError, find_control, make_control, status
from saeql.pipelines.dictionaries import start_dictionary
from saeql.pipelines.fixed_dictionaries import ThresholdWork
from saeql.pipelines.model_config import ModelConfig
from saeql.pipelines.models import ModelMismatch, load_model
from saeql.pipelines.probing.probe_receipts import single_latents
from saeql.pipelines.receipts.control_gaps import Trained
from saeql.pipelines.receipts.control_scores import feature_scores, gap, percentiles
from saeql.pipelines.receipts.receipt import Receipt, receipts_table
from saeql.pipelines.verify import verify_run
from saeql.sae.checkpoint import checkpoints

MADE = ("random", "frozen-decoder", "soft-frozen", "randomised-model", "second-seed")


@pytest.fixture(scope="module")
def parent(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run with all control runs of `MADE`."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("controls") / "run")
    main(["control", str(folder), *(word for kind in MADE for word in ("--kind", kind))])
    return Run.open(folder)


def of(parent: Run, kind: str) -> Run:
    found = find_control(parent, kind)
    assert found is not None
    return found


def start_of(run: Run) -> torch.Tensor:
    trained = run.dictionary()
    return start_dictionary(run.spec, trained.d_in, trained.d_out).W_dec.detach()


def test_random_rows_fire_as_often_as_the_trained_ones(parent: Run):
    run = of(parent, "random")
    trained, fixed = (
        10 ** load_file(r.dictionary_path / "sparsity.safetensors")["sparsity"].double() - 1e-10 for r in (parent, run)
    )
    num_rows = run.evidence.read("split_rows", split="train")["num_kept_rows"][0].as_py()
    off = (trained - fixed).abs() - 0.02 * trained
    assert float((off * num_rows <= 1.5).double().mean()) >= 0.95
    assert float(off.max()) * num_rows <= 20  # windows of few words repeat: equal rows cannot be told apart
    assert (fixed > 0).sum() > 40
    assert torch.equal(run.dictionary().W_dec, start_of(run))
    assert not checkpoints(run.path / "checkpoints")
    assert run.dictionary().config.freeze == "all"


def test_directions_that_are_few_make_a_narrower_dictionary(parent: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    made = make_control(run, "neurons", out=tmp_path / "elsewhere")
    assert made.config.dictionary.d_sae == 64  # two directions for each of 32 coordinates
    assert status(run, "neurons") == "harvest done" and (tmp_path / "elsewhere" / "control.json").exists()
    list(made.execute(("train",)))
    rows = made.dictionary().W_dec.detach()
    assert ((rows != 0).sum(1) == 1).all() and len({tuple(row) for row in rows.tolist()}) == 64


def test_a_frozen_decoder_keeps_every_bit_and_the_encoder_learns(parent: Run):
    run = of(parent, "frozen-decoder")
    trained, start = run.dictionary(), start_of(run)
    assert torch.equal(trained.W_dec, start)
    assert not torch.allclose(trained.W_enc, parent.dictionary().W_enc)
    encoder = torch.nn.functional.cosine_similarity(trained.W_enc, start, dim=1)
    assert float(encoder.median().detach()) < 0.999
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert lines[-1]["fvu"] < lines[0]["fvu"]


def test_a_soft_frozen_decoder_turns_no_further_than_it_may(parent: Run):
    run = of(parent, "soft-frozen")
    cosines = torch.nn.functional.cosine_similarity(run.dictionary().W_dec, start_of(run), dim=1)
    assert float(cosines.min().detach()) >= 0.8 - 1e-5
    assert int((cosines < 0.8 + 1e-4).sum()) > 0  # some would have gone further
    free = torch.nn.functional.cosine_similarity(parent.dictionary().W_dec, start_of(parent), dim=1)
    assert float(free.min().detach()) < 0.8


def test_a_soft_frozen_training_resumes_to_identical_weights(parent: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(of(parent, "soft-frozen").path, tmp_path / "copy", symlinks=True))
    run.activations.unlink()
    run.activations.symlink_to(parent.activations)
    before = (run.dictionary_path / "sae_weights.safetensors").read_bytes()
    shutil.rmtree(checkpoints(run.path / "checkpoints")[-1])
    shutil.rmtree(run.path / "dictionaries")
    list(run.execute(("train",), again=True, resume=True))
    assert (run.dictionary_path / "sae_weights.safetensors").read_bytes() == before


def test_a_randomised_model_keeps_shapes_and_moments_and_is_another(tiny_model_folder: Path):
    config = ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.1", dtype="float32")
    plain, drawn, everything, other = (
        load_model(replace(config, **more))
        for more in ({}, {"randomise": "weights"}, {"randomise": "all"}, {"randomise": "weights", "randomise_seed": 1})
    )
    weights = dict(drawn.model.named_parameters())
    for name, p in plain.model.named_parameters():
        kept = p.dim() < 2 or "embed" in name or "lm_head" in name
        assert torch.equal(p, weights[name]) == kept, name
        assert p.shape == weights[name].shape
        if not kept:
            assert float(weights[name].std()) == pytest.approx(float(p.std()), rel=0.1)
            assert float(weights[name].norm()) == pytest.approx(float(p.norm()), rel=0.1)
    ids = torch.tensor([[1, 5, 9, 11]])
    with torch.no_grad():
        outputs = [lm.model(ids).logits for lm in (plain, drawn, everything, other)]
    assert not any(torch.allclose(a, b) for n, a in enumerate(outputs) for b in outputs[:n])
    assert len({lm.identity.model_sha256 for lm in (plain, drawn, everything, other)}) == 4
    with pytest.raises(ModelMismatch, match="model_sha256"):
        plain.identity.require(drawn.identity)
    again = load_model(replace(config, randomise="weights"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), drawn.model.parameters(), strict=True))
    short = load_model(replace(config, randomise="weights", truncate=True))
    layer = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(short.model.get_parameter(layer), drawn.model.get_parameter(layer))


def test_the_dictionary_of_a_randomised_model_says_so(parent: Run):
    run = of(parent, "randomised-model")
    ours = run.dictionary().metadata["saeql"]
    assert ours["randomised"] == "weights"
    assert ours["identity"]["model_sha256"] != parent.dictionary().metadata["saeql"]["identity"]["model_sha256"]
    assert not run.activations.is_symlink()
    row = run.evidence.read("runs").to_pylist()[0]
    assert json.loads(row["config"])["model"]["randomise"] == "weights"


def test_a_second_seed_starts_elsewhere_and_data_seed_holds_the_order(parent: Run, tmp_path: Path):
    run = of(parent, "second-seed")
    assert run.config.seed == parent.config.seed + 1
    assert not torch.allclose(start_of(run), start_of(parent))
    from saeql.pipelines.training_stream import data_seed

    assert data_seed(run.config) == 4
    assert data_seed(replace(run.config, train=replace(run.config.train, data_seed=3))) == 3


def test_activations_are_there_once_and_every_file_verifies(parent: Run):
    run = of(parent, "frozen-decoder")
    assert str(run.activations.readlink()) == "../../activations"
    windows = [r.evidence.files("windows")[0] for r in (parent, run)]
    assert windows[0].samefile(windows[1])
    for one in (run, parent):
        found = one.verify()
        assert found.damage == [] and found.unrecorded == []
    with pytest.raises(RunError, match="reads the activations of another run"):
        list(run.execute(("harvest",), again=True))
    assert parent.finished().keys() >= {"harvest", "train", "index", "label"}


def test_labels_of_control_runs_are_real_and_stand_beside_the_runs(parent: Run):
    receipts = {r.control: r for r in compare_controls(Trained(parent)) if r.feature is None}
    mine, random = feature_scores(parent), feature_scores(of(parent, "random"))
    assert mine.scored_on == random.scored_on == "N1"
    found = receipts["C6 random dictionary"]
    assert found.low is not None and found.value is not None and found.high is not None
    assert found.value == pytest.approx(np.median(mine.of_labels()) - np.median(random.of_labels()))
    assert found.low <= found.value <= found.high and found.n == len(mine.of_labels()) + len(random.of_labels())
    share = receipts["C6 random dictionary C3 share"]
    assert share.value is not None and 0 <= share.value <= (receipts["C6 random dictionary labelled share"].value or 0)
    assert receipts["C6 random dictionary labelled share"].n == int(random.is_alive.sum())
    turned = receipts["C7 frozen baselines cosine with start frozen-decoder"]
    assert turned.value == pytest.approx(1.0, abs=1e-6) and sum(turned.detail["counts"]) == 96
    assert (receipts["C7 frozen baselines cosine with start"].value or 1) < 1
    missing = receipts["C7 frozen baselines frozen-encoder"]
    assert missing.value is None and missing.verdict == "failed"
    assert f"saeql control {parent.path} --kind frozen-encoder" in missing.detail["missing"]
    assert receipts["C9 seed stability"].n == 96
    assert not receipts["C9 seed stability"].detail["same_start"]
    columns, rows = control_table(Trained(parent))
    assert [row[0] for row in rows] == ["trained", *MADE]
    assert all(len(row) == len(columns) for row in rows)


def test_receipts_are_evidence_and_replace_their_own_kind_only(parent: Run, tmp_path: Path):
    parent = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    other = Receipt(control="C2 true null", value=0.5, verdict="passed", n=7)
    parent.evidence.write("receipts", receipts_table(parent.spec.name, [other]))
    probed = Receipt(control="C10 selectivity", value=0.5, verdict="passed", n=7)
    parent.evidence.write("receipts", receipts_table(parent.spec.name, [probed]), part="probing-x")
    found = compare_controls(Trained(parent))
    for _ in range(2):
        with parent.locked():
            save_receipts(parent, found)
    controls = parent.evidence.read("receipts")["control"].to_pylist()
    assert controls.count("C2 true null") == controls.count("C10 selectivity") == 1
    assert len(controls) == len(found) + 2
    flags = [r for r in found if r.control == "C9 seed stability of the feature"]
    assert [r.feature for r in flags] == list(range(96))
    assert {r.verdict for r in flags} <= {"passed", "failed"}


def test_what_the_parent_made_anew_makes_controls_out_of_date(parent: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    assert status(run, "random") == "finished" and status(run, "pca") == "none"
    list(run.execute(("index",), again=True))
    assert status(run, "random") == "out of date: index ran again"
    assert status(run, "frozen-decoder") == "finished"  # it reads nothing of the index
    with pytest.raises(ControlRunError, match="before the last index"):
        make_control(run, "random")


def test_what_cannot_be_made_is_refused_in_one_line(parent: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ControlRunError, match='did you mean "random"'):
        make_control(parent, "rnadom")
    with pytest.raises(ControlRunError, match="is a control itself"):
        make_control(of(parent, "frozen-decoder"), "random")
    with pytest.raises(SystemExit):
        main(["control", str(parent.path), "--out", str(tmp_path / "x")])
    assert "--out names the folder of one control run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dictionary.freeze": "all"}, 'set dictionary.architecture = "jumprelu"'),
        ({"dictionary.freeze": "decodr"}, 'did you mean "decoder"'),
        ({"dictionary.rates_from": "x"}, "only goes with dictionary.freeze"),
        ({"dictionary.start": "pca", "dictionary.start_from": "x"}, "set one of them"),
        ({"dictionary.start": "pca", "dictionary.form": "transcoder"}, "a form that writes what it reads"),
        ({"model.randomise": "weights", "model.device_map": "auto"}, "model.randomise redraws plain weights"),
    ],
)
def test_switches_that_do_not_fit_are_named(overrides: dict[str, str], message: str, tiny_config: Path):
    with pytest.raises(ValueError, match=message):
        load_config(tiny_config, overrides)


def test_a_gap_of_medians_and_its_interval():
    rng = np.random.default_rng(0)
    high, low = rng.normal(0.8, 0.05, 400), rng.normal(0.7, 0.05, 300)
    found = gap(high, low)
    assert found.value == pytest.approx(0.1, abs=0.02) and 0.08 < found.low < found.value < found.high < 0.12
    assert gap(low, high).high < 0 and gap(high, low, mean=True).value == pytest.approx(high.mean() - low.mean())
    wider = gap(high, low, of_documents=0.02 * rng.standard_normal(2000))
    assert wider.value == found.value and wider.high - wider.low > 2 * (found.high - found.low)
    assert np.isnan(gap(high, np.zeros(0)).value)
    assert percentiles(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [0, 0.375, 1]


def test_medians_over_documents_are_those_of_the_labels_scored_anew(parent: Run):
    from saeql.pipelines.label import labels_of
    from saeql.pipelines.receipts.document_medians import document_moves_of
    from saeql.pipelines.split_rows import read_feature_rows

    moved = document_moves_of(parent, draws=40, seed=0).median
    assert moved.shape == (40,) and 0 < moved.std() < 0.05
    rows = read_feature_rows(parent.evidence, parent.spec.name, active_fraction=0.25).test
    times = np.random.default_rng(0).multinomial(
        rows.num_documents, np.full(rows.num_documents, 1 / rows.num_documents), 40
    )
    weights = np.where(rows.eligible, times[7][rows.documents], 0)
    scores = {0: [], 1: []}
    for feature, label in labels_of(parent.evidence.read("labels")).items():
        assert label.predicate is not None
        holds = label.predicate.rows(rows.windows).ravel()
        active = np.zeros(len(holds), bool)
        active[rows.active.by_feature()[feature]] = True
        for number, w in enumerate((rows.eligible.astype(int), weights)):
            rate = (
                (w * (holds & active)).sum() / (w * active).sum(),
                (w * ~(holds | active)).sum() / (w * ~active).sum(),
            )
            scores[number].append(sum(rate) / 2)
    assert moved[7] == pytest.approx(np.median(scores[1]) - np.median(scores[0]), abs=1e-5)


def test_labels_that_are_not_evidence_yet_are_compared_alike(parent: Run):
    from saeql.pipelines.label import labels_of
    from saeql.pipelines.receipts.control import Labelled
    from saeql.pipelines.receipts.held_out import HeldOut
    from saeql.pipelines.receipts.random_dictionary import RandomDictionary
    from saeql.pipelines.receipts.randomised_model import RandomisedModel
    from saeql.pipelines.split_rows import read_feature_rows

    rows = read_feature_rows(parent.evidence, parent.spec.name, active_fraction=0.25)
    held_out = HeldOut.of_evidence(rows, parent.evidence, parent.config.label)
    alive = np.flatnonzero(rows.test.active.counts).tolist()
    labels = labels_of(parent.evidence.read("labels"))
    labelled = Labelled(parent, rows, labels, held_out.sample("test", alive), "full", held_out=held_out)
    for control in (RandomDictionary(), RandomisedModel()):
        now, before = control.check(labelled), control.compare(Trained(parent))
        assert [r.control for r in now] == [r.control for r in before]
        for mine, theirs in zip(now, before, strict=True):
            assert mine.value == pytest.approx(theirs.value, abs=1e-6) and mine.verdict == theirs.verdict, mine.control
    assert RandomDictionary().check(Labelled(of(parent, "random"), rows, {}, {}, "full")) == []


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """40 documents of the words of the tiny corpus, in an order of their own."""
    words = json.loads(tiny_corpus.read_text().splitlines()[0])["text"].split()
    rng, file = np.random.default_rng(5), tmp_path_factory.mktemp("second") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 80))}) + "\n" for _ in range(40)))
    return file


def test_labels_are_executed_on_a_second_corpus(parent: Run, other_text: Path, tmp_path: Path):
    run = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    main(["control", str(run.path), "--kind", "second-corpus", "--corpus.source", str(other_text)])
    made = of(run, "second-corpus")
    weights = [r.dictionary_path / "sae_weights.safetensors" for r in (run, made)]
    assert weights[0].read_bytes() == weights[1].read_bytes() and list(made.finished()) == ["harvest", "train", "index"]
    assert not verify_run(made.path).damage and not made.evidence.has("labels")
    receipts = [r for r in run.evidence.read("receipts").to_pylist() if r["control"].startswith("C14b ")]
    whole = {r["control"]: r for r in receipts if r["feature"] is None}
    own = {r["feature"]: r for r in receipts if r["feature"] is not None}
    loss = whole["C14b second corpus loss"]
    assert loss["n"] == len(own) > 5 and loss["low"] <= loss["value"] <= loss["high"]
    detail = json.loads(loss["detail"])
    assert detail["text"]["documents"] == 40 and detail["text"]["rows"] == made_rows(made)
    labels = {r["feature"]: r for r in run.evidence.read("labels").to_pylist()}
    feature, receipt = next(iter(own.items()))
    assert json.loads(receipt["detail"])["own_test_text"] == pytest.approx(labels[feature]["auroc"], abs=1e-4)
    assert receipt["value"] == pytest.approx(auroc_by_hand(run, made, feature, labels[feature]["predicate"]), abs=1e-6)
    assert receipt["n"] >= 20


def made_rows(made: Run) -> int:
    from saeql.pipelines.split_rows import read_feature_rows

    rows = read_feature_rows(made.evidence, made.spec.name, active_fraction=0.25)
    return sum(rows.of(split).num_rows for split in ("train", "calibration", "test"))


def auroc_by_hand(run: Run, made: Run, feature: int, predicate: str) -> float:
    """(TPR + TNR) / 2 over all rows of the second text, active as on the run's own train rows."""
    from saeql.pipelines.predicates import Predicate
    from saeql.pipelines.split_rows import read_feature_rows

    label = Predicate.from_json(predicate)
    own = run.evidence.read("activations").to_pylist()
    is_train = set(run.evidence.read("windows", split="train")["window_id"].to_pylist())
    largest = max(a["activation"] for a in own if a["feature"] == feature and a["window_id"] in is_train)
    there = [a for a in made.evidence.read("activations").to_pylist() if a["feature"] == feature]
    fires = {(a["window_id"], a["position"]) for a in there if a["activation"] > np.float32(0.25) * np.float32(largest)}
    counts = np.zeros((2, 2))
    rows = read_feature_rows(made.evidence, made.spec.name, active_fraction=0.25)
    for split in (rows.train, rows.calibration, rows.test):
        width, holds = split.windows.tokens.shape[1], label.rows(split.windows).ravel()
        for row in np.flatnonzero(split.eligible).tolist():
            place = int(split.window_ids[row // width]), row % width
            counts[int(place in fires), int(holds[row])] += 1
    return (counts[1, 1] / counts[1].sum() + counts[0, 0] / counts[0].sum()) / 2


def test_keys_of_the_corpus_go_with_kinds_that_read_it(parent: Run, tmp_path: Path, tiny_corpus: Path):
    run = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    for kind, keys, message in (
        ("second-corpus", {}, "needs a text that the run has not read: --corpus.source FILE"),
        ("random", {"corpus.max_tokens": "900"}, "reads the run's activations; keys of .corpus. go with randomised"),
        ("randomised-all", {"train.num_steps": "9"}, "only keys of .corpus. can"),
        ("randomised-all", {"corpus.max_tokns": "9"}, "max_tokens"),
        ("randomised-model", {"corpus.max_tokens": "900"}, "already holds a run with corpus.max_tokens = 0, not 900"),
        ("second-corpus", {"corpus.source": str(tmp_path / "none")}, "no corpus at"),
    ):
        with pytest.raises(ValueError, match=message):
            make_control(run, kind, corpus=keys)
    assert not (run.path / "controls" / "second-corpus" / "config.toml").exists()
    assert make_control(run, "randomised-all", corpus={"corpus.max_tokens": "900"}).config.corpus.max_tokens == 900
    main(["control", str(run.path), "--kind", "second-corpus", "--corpus.source", str(tiny_corpus)])
    (receipt,) = (r for r in run.evidence.read("receipts").to_pylist() if r["control"].startswith("C14b "))
    assert receipt["value"] is None and "are documents of the run: name another text" in receipt["detail"]


def test_every_stage_runs_on_a_dictionary_that_was_not_trained(parent: Run, tmp_path: Path):
    made = make_control(Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True)), "random")
    assert [stage for stage, seconds in made.execute() if seconds is not None] == ["evaluate", "store", "report"]
    metrics = {m["metric"]: m["value"] for m in made.evidence.read("metrics").to_pylist()}
    assert metrics["l0"] == pytest.approx(4, abs=1)  # the trained one has 4 on train
    assert (made.path / "report.html").stat().st_size > 0


def test_the_command_lists_and_compares_as_json(parent: Run, capsys: pytest.CaptureFixture[str]):
    main(["control", str(parent.path), "--list", "--json"])
    listed = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["random"]["state"] == "finished" and listed["pca"]["state"] == "none"
    assert listed["pca"]["where"] == f"saeql control {parent.path} --kind pca"
    main(["control", str(parent.path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["dictionary"] for row in rows] == ["trained", *MADE]


#: `saeql train` of thresholds that gets a signal when it has saved so many times.
INTERRUPTED = """
import os, signal, sys
from saeql.pipelines import cli, fixed_dictionaries

run, name, saves = sys.argv[1:]
fixed_dictionaries.SAVE_SECONDS, fixed_dictionaries._BATCH_TOKENS, write_whole = 0, 64, fixed_dictionaries.write_whole
written = []

def counted(path, content):
    write_whole(path, content)
    written.append(path)
    if len(written) == int(saves):
        os.kill(os.getpid(), getattr(signal, name))

fixed_dictionaries.write_whole = counted
sys.argv[1:] = ["train", run, "--resume"]
cli.main()
"""


@pytest.mark.parametrize(
    ("name", "saves"),
    [("SIGTERM", 3), *(pytest.param(n, s, marks=pytest.mark.full) for n in ("SIGTERM", "SIGKILL") for s in (1, 7, 20))],
)
def test_a_stopped_fit_of_thresholds_goes_on_to_the_same_bits(
    name: str, saves: int, tiny_run: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("saeql.pipelines.fixed_dictionaries._BATCH_TOKENS", 64)
    run = Run.open(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    whole = make_control(run, "random")
    made = Run.open(Path(shutil.copytree(whole.path, run.path / "controls" / "again", symlinks=True)))
    list(whole.execute(("train",)))
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(made.path), name, str(saves)], capture_output=True, text=True
    )
    file = made.path / f"thresholds.{made.spec.name}.safetensors"
    assert done.returncode == (75 if name == "SIGTERM" else -signal.SIGKILL), done.stderr
    assert file.exists() and "train" not in made.finished()
    read = []
    load = ThresholdWork.load
    monkeypatch.setattr(ThresholdWork, "load", lambda self: read.append(load(self)) or read[-1])
    list(made.execute(("train",)))
    assert len(read) == 1 and read[0] is not None and not file.exists()
    for key, tensor in whole.dictionary().state_dict().items():
        assert torch.equal(tensor, made.dictionary().state_dict()[key]), key


def test_latents_and_steering_stand_beside_those_of_the_frozen_baseline(parent: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(parent.path, tmp_path / "copy", symlinks=True))
    frozen, title = of(run, "frozen-decoder"), "C7 frozen baselines"

    def receipts() -> dict[str, Receipt]:
        return {r.control: r for r in compare_controls(Trained(run)) if r.feature is None}

    before = receipts()
    latent, steering = (before[f"{title} frozen-decoder {what}"] for what in ("one latent", "steering"))
    assert latent.verdict == steering.verdict == "reported" and latent.value is steering.value is None
    assert latent.detail["missing"] == f"`saeql probe {run.path}` first"
    assert before[f"{title} N2, one latent or steering"].detail["not measured"] == ["one latent", "steering"]

    for one in (run, frozen):
        main(["probe", str(one.path), "--max-cases", "100"])
        words = ["effect", str(one.path), "--top", "3", "--strengths=0.5,1.0", "--random", "4"]
        main([*words, "--tokens", "64", "--texts", "0", "--out", str(tmp_path / one.path.name)])
    after, mine = receipts(), {task.task: auroc for task, auroc in single_latents(run).items()}
    other = {task.task: auroc for task, auroc in single_latents(frozen).items()}
    latent, steering = (after[f"{title} frozen-decoder {what}"] for what in ("one latent", "steering"))
    assert len(mine) >= 2 and latent.n == len(mine) and latent.low is not None and latent.high is not None
    assert latent.value is not None
    assert latent.value == pytest.approx(np.mean([mine[task] - other[task] for task in mine]))
    assert latent.low <= latent.value <= latent.high
    assert latent.verdict == ("passed" if latent.low > 0 else "failed")
    shifts = []
    for one in (run, frozen):
        rows = one.evidence.read("steering_effects").to_pylist()
        shifts.append([r["own_shift"] for r in rows if r["method"] == "steered" and r["at_budget"]])
    assert steering.value == pytest.approx(np.median(shifts[0]) - np.median(shifts[1])) and steering.n == 6
    all_three = after[f"{title} N2, one latent or steering"]
    assert all_three.n == 3 and all_three.detail["measured"]["steering"] == f"{title} frozen-decoder steering"
    passed = [w for w in ("N2", "one latent", "steering") if all_three.detail["measured"][w] in _passed(after)]
    assert all_three.detail["above"] == passed and all_three.value == len(passed)

    main(["effect", str(frozen.path), "--top", "2", "--strengths=0.5,1.0", "--tokens", "64", "--texts", "0",
          "--random", "4", "--out", str(tmp_path / "again")])  # fmt: skip
    assert receipts()[f"{title} frozen-decoder steering"].detail["missing"] == "features is 3 and 2: measure both alike"


def _passed(receipts: dict[str, Receipt]) -> set[str]:
    return {name for name, receipt in receipts.items() if receipt.verdict == "passed"}
