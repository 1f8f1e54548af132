"""The guard: thresholds that keep a rate, events where a feature fires and nowhere else, and no trace afterwards."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from saeql.pipelines import Edit, Run, Steerer, capture
from saeql.pipelines.cli import main
from saeql.pipelines.guarding.guard import Guard, GuardError, Watched, rows_sha256, window_means
from saeql.pipelines.guarding.learn import GuardOptions, learn_guard
from saeql.pipelines.guarding.rates import Rate, allowed, least_texts, level_for, upper_bound
from saeql.pipelines.guarding.report import verdicts
from saeql.pipelines.guarding.texts import read_texts
from saeql.pipelines.guarding.watch import Event, GuardFired, guarded, watching

#: What the tiny model may write: its words, each one token, all of which a feature fires on.
OPTIONS = {"repetition_penalty": 1.0, "prefix_allowed_tokens_fn": lambda _batch, _ids: list(range(5, 45, 2))}
GOOD_WORDS = ["walking", "blue", "house", "runs", "of", "stone", "green", "water", "and"]


@pytest.fixture(scope="module")
def run(token_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run whose feature i fires on token i + 3 alone, with a store."""
    folder = tmp_path_factory.mktemp("guard") / "run"
    shutil.copytree(token_run, folder)
    made = Run.open(folder)
    list(made.execute(("label", "evaluate", "store")))
    return made


@pytest.fixture(scope="module")
def steerer(run: Run) -> Steerer:
    return run.steerer()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """120 bad texts, each with " river" somewhere, and 160 good ones without."""
    rng, folder = random.Random(1), tmp_path_factory.mktemp("texts")
    bad, good = folder / "bad.txt", folder / "good.txt"
    for path, count, word in ((bad, 120, "river"), (good, 160, "bank")):
        lines = []
        for _ in range(count):
            words = [rng.choice(GOOD_WORDS) for _ in range(14)]
            lines.append(" ".join([*words[:5], word, *words[5:]]))
        path.write_text("\n".join(lines) + "\n")
    return bad, good


def feature_of(steerer: Steerer, token: str) -> int:
    return steerer.lm.tokenizer(token, add_special_tokens=False)["input_ids"][0] - 3


def guard_of(steerer: Steerer, *features: int, threshold: float = 0.1, window: int = 1) -> Guard:
    identity = steerer.lm.identity
    watched = tuple(Watched(f, f"label {f}", threshold, 1.0) for f in features)
    return Guard(
        watched, window, identity.model_name, identity.model_sha256, "d", rows_sha256(steerer.dictionary, features)
    )


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- rates -------------------------------------------------------------------------------------------------------


def test_bounds_are_those_of_clopper_and_pearson():
    assert upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(7, 7) == 1.0
    rate = Rate.of(np.array([True] * 3 + [False] * 27))
    assert (rate.hits, rate.n) == (3, 30)
    # the ends at which 3 of 30 or more (or fewer) come up in 2.5 % of cases
    from scipy.stats import binom

    assert binom.sf(2, 30, rate.low) == pytest.approx(0.025) and binom.cdf(3, 30, rate.high) == pytest.approx(0.025)


def test_a_rate_is_certified_by_enough_texts_only():
    assert least_texts(0.01) == 299
    assert upper_bound(0, 299) <= 0.01 < upper_bound(0, 298)
    assert allowed(0.01, 298) == 2  # not certified: what the rate itself gives
    assert allowed(0.01, 299) == 0  # certified, with none
    hits = allowed(0.01, 2000)
    assert upper_bound(hits, 2000) <= 0.01 < upper_bound(hits + 1, 2000)


def test_no_more_good_texts_exceed_a_level_than_are_allowed():
    rng = np.random.default_rng(0)
    for n, rate in ((50, 0.1), (400, 0.01), (1000, 0.05)):
        scores = rng.integers(0, 12, n).astype(float)  # many ties
        level = level_for(scores, rate)
        assert (scores > level).sum() <= allowed(rate, n)
        below = scores[scores < level]
        assert len(below) == 0 or (scores > below.max()).sum() > allowed(rate, n)


def test_a_certificate_holds_as_often_as_it_says():
    """Thresholds set for 5 % on 200 calibration texts: in at least 95 % of draws the true rate is within."""
    rng = np.random.default_rng(3)
    true = [float(np.exp(-level_for(rng.exponential(size=200), 0.05))) for _ in range(400)]
    assert np.mean(np.array(true) <= 0.05) >= 0.93


# --- learning ----------------------------------------------------------------------------------------------------


def test_the_word_that_bad_texts_have_in_common_is_found(run: Run, steerer: Steerer, files: tuple[Path, Path]):
    guard = learn_guard(run, *files, GuardOptions(false_positives=0.1, windows=(1, 4)))
    assert guard.ids == [feature_of(steerer, " river")] and guard.window == 1
    assert guard.features[0].auroc == 1.0 and 0 < guard.features[0].threshold < 0.2
    rates = guard.found["rates"]
    assert rates["features"]["caught"]["value"] == 1.0 and rates["features"]["false_positives"]["hits"] == 0
    assert rates["features"]["caught"]["n"] == guard.found["texts"]["test"]["bad"]
    assert rates["word list"]["caught"]["value"] == 1.0 and rates["dense probe"]["caught"]["value"] > 0.9
    assert "no difference" in verdicts(guard.found)[1]


def test_a_feature_of_other_words_catches_what_chance_gives(run: Run, steerer: Steerer, files: tuple[Path, Path]):
    named = GuardOptions(false_positives=0.2, features=(feature_of(steerer, " stone"),), windows=(1,))
    found = learn_guard(run, *files, named).found
    caught = found["rates"]["features"]["caught"]
    assert caught["low"] <= 0.2 <= 1 and caught["value"] < 0.5
    assert found["against"]["word list"]["high"] < 0
    assert "the word list catches more" in verdicts(found)[1]
    assert "is not certified" in verdicts(found)[0] or found["certified"]


def test_parts_are_of_different_texts_and_repeats_count_once(files: tuple[Path, Path], tmp_path: Path):
    texts = read_texts(*files)
    parts = [set(texts.good[part]) for part in texts.good]
    assert all(a.isdisjoint(b) for i, a in enumerate(parts) for b in parts[i + 1 :])
    twice = tmp_path / "twice.txt"
    twice.write_text(files[0].read_text() * 2)
    assert read_texts(twice, files[1]).bad == texts.bad


def test_a_mean_over_a_window_counts_what_is_before_the_text_as_zero():
    values = torch.tensor([0.0, 0.0, 3.0, 6.0, 0.0])[None, :, None]  # two before, three tokens
    assert window_means(values, 3)[0, :, 0].tolist() == pytest.approx([1.0, 3.0, 3.0])
    assert window_means(values, 1) is values


# --- watching ----------------------------------------------------------------------------------------------------


def test_events_are_where_the_feature_fires(steerer: Steerer):
    river = feature_of(steerer, " river")
    with guard_of(steerer, river, feature_of(steerer, " blue")).watching(steerer) as watch:
        steerer.generate("the river of blue river", max_new_tokens=1)
    prompt = [event for event in watch.events if not event.generated]
    assert [(event.feature, event.position, event.token) for event in prompt] == [
        (river, 2, " river"), (feature_of(steerer, " blue"), 4, " blue"), (river, 5, " river"),
    ]  # fmt: skip
    assert all(event.value == pytest.approx(0.2, abs=0.01) and event.threshold == 0.1 for event in prompt)
    assert no_hooks(steerer.lm.model)


def test_a_window_goes_on_from_prompt_to_written_tokens(steerer: Steerer):
    """Token by token with a cache, the same events as in one forward pass over the whole text."""
    options = {**OPTIONS, "max_new_tokens": 12}
    written = steerer.lm.tokenizer(steerer.generate("the river", **options), add_special_tokens=False)["input_ids"]
    features = sorted({token - 3 for token in written})[:3]
    guard = guard_of(steerer, *features, threshold=0.06, window=3)
    by_token = guarded(guard, steerer, "the river", **options).events
    assert by_token and any(event.generated for event in by_token)
    ids = torch.tensor([[1, *steerer.lm.tokenizer("the river", add_special_tokens=False)["input_ids"], *written]])
    with watching(guard, steerer) as watch, torch.no_grad():
        steerer.lm.model(input_ids=ids[:, :-1])
    at_once = [(event.feature, event.position, event.token) for event in watch.events]
    assert at_once == [(event.feature, event.position, event.token) for event in by_token]


def test_stop_writes_nothing_after_the_token_that_fired(steerer: Steerer):
    options = {**OPTIONS, "max_new_tokens": 10}
    whole = steerer.generate("the stone", **options)
    ids = steerer.lm.tokenizer(whole, add_special_tokens=False)["input_ids"]
    at = next(n for n, token in enumerate(ids) if n >= 1 and token not in ids[:n])
    found = guarded(guard_of(steerer, ids[at] - 3), steerer, "the stone", "stop", **options)
    assert found.stopped and len(found.events) == 1 and found.events[0].position == 3 + at
    assert found.text == steerer.lm.tokenizer.decode(ids[: at + 1]) and whole.startswith(found.text)
    in_prompt = guarded(guard_of(steerer, feature_of(steerer, " stone")), steerer, "the stone", "stop", **options)
    assert in_prompt.stopped and in_prompt.text == ""
    with pytest.raises(GuardFired), guard_of(steerer, ids[at] - 3).watching(steerer, "stop"):
        steerer.generate("the stone", **options)
    assert no_hooks(steerer.lm.model)
    assert steerer.generate("the stone", **options) == whole


@pytest.mark.parametrize(("action", "to"), [("ablate", None), ("clamp", 2.0)])
def test_a_feature_is_changed_from_its_first_event_on(steerer: Steerer, action: str, to: float | None):
    river = feature_of(steerer, " river")
    ids = torch.tensor([[1, *steerer.lm.tokenizer(" the blue river of river", add_special_tokens=False)["input_ids"]]])

    def rows(change) -> torch.Tensor:
        with change, capture(steerer.lm.model, ["mlp_in.0"]) as reader, torch.no_grad():
            return reader.run(ids)["mlp_in.0"]

    plain = rows(watching(guard_of(steerer, river), steerer))
    changed = rows(watching(guard_of(steerer, river), steerer, action, to=to))
    by_hand = rows(steerer.applied([Edit(river, action, to=to, positions=(3, 4, 5))]))
    assert torch.equal(changed[:, :3], plain[:, :3]) and not torch.equal(changed[:, 3:], plain[:, 3:])
    assert torch.allclose(changed, by_hand, atol=1e-6)
    unfired = rows(watching(guard_of(steerer, river, threshold=9.0), steerer, action, to=to))
    assert torch.equal(unfired, plain)


def test_texts_of_a_batch_are_watched_apart(steerer: Steerer):
    river = feature_of(steerer, " river")
    guard = guard_of(steerer, river)
    with guard.watching(steerer) as watch:
        steerer.generate_all(["the river", "green water and the house of river"], max_new_tokens=1)
    assert [(event.text, event.position) for event in watch.events if not event.generated] == [(0, 2), (1, 7)]
    with pytest.raises(GuardError, match="one text at a time"), guard.watching(steerer, "ablate"):
        steerer.generate_all(["the river", "the house"], max_new_tokens=1)
    assert no_hooks(steerer.lm.model)


def test_no_hook_stays_after_an_exception(steerer: Steerer):
    def fail(event: Event) -> None:
        raise RuntimeError("from outside")

    with pytest.raises(RuntimeError, match="from outside"):
        guarded(guard_of(steerer, feature_of(steerer, " river")), steerer, "the river", on_event=fail)
    assert no_hooks(steerer.lm.model)


def test_a_guard_of_another_dictionary_is_refused(steerer: Steerer):
    guard = guard_of(steerer, 4)
    with pytest.raises(GuardError, match="another dictionary"), replace(guard, rows_sha256="0").watching(steerer):
        pass
    with pytest.raises(GuardError, match="not this model's"), replace(guard, model_sha256="0").watching(steerer):
        pass
    with pytest.raises(GuardError, match="no action 'halt': there is log"), guard.watching(steerer, "halt"):
        pass


# --- the command -------------------------------------------------------------------------------------------------


def test_learn_and_run_from_the_command_line(
    run: Run, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, log = tmp_path / "guard.json", tmp_path / "events.jsonl"
    bad, good = map(str, files)
    main(["guard", "learn", str(run.path), "--bad", bad, "--good", good, "--out", str(out), "--window", "1",
          "--false-positives", "0.1"])  # fmt: skip
    assert "these features" in capsys.readouterr().out
    assert Guard.load(out).window == 1
    shared = ["guard", "run", str(run.path), "--guard", str(out), "--prompt", "the river", "--tokens", "2"]
    main([*shared, "--action", "stop", "--log", str(log), "--json"])
    found = json.loads(capsys.readouterr().out)["texts"][0]
    assert found["stopped"] and found["events"][0]["token"] == " river"
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert logged == [found["events"][0] | {"action": "stop"}]
    main([*shared, "--stream"])
    output = capsys.readouterr().out
    assert output.startswith("the river") and "fires above" in output


@pytest.mark.parametrize(
    ("content", "says"),
    [("{}", "is no guard"), ("[1]", "is no guard"), ("not json", "is no guard"), (None, "cannot be read")],
)
def test_a_file_that_is_no_guard_is_one_line(
    run: Run, content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "guard.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["guard", "run", str(run.path), "--guard", str(file), "--prompt", "the"])
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_texts_that_do_not_do_are_one_line(
    run: Run, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    few = tmp_path / "few.txt"
    few.write_text("the river\nthe bank\n")
    for bad, good, more, says in (
        (few, files[1], [], "give more"),
        (files[0], files[0], [], "are in"),
        (*files, ["--false-positives", "0"], "above 0"),
        (*files, ["--feature", "999"], "no feature 999"),
        (tmp_path / "none.jsonl", files[1], [], "no corpus"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["guard", "learn", str(run.path), "--bad", str(bad), "--good", str(good), "--out",
                  str(tmp_path / "g.json"), *more])  # fmt: skip
        error = capsys.readouterr().err
        assert caught.value.code == 2 and says in error.splitlines()[-1], error
