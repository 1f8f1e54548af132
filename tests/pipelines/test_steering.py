"""Steering against edits computed by hand, at every mode, unit and rule of positions; and no trace afterwards."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.steering.edits import Edit, SteerError
from saeql.pipelines.steering.positions import schedule_factor
from saeql.pipelines.steering.selection import chosen
from saeql.pipelines.steering.steerer import Steerer
from saeql.sae.hooks import capture

IDS = torch.tensor([[1, 5, 9, 11, 13, 15], [1, 8, 9, 21, 13, 17]])
HOOK = "resid_post.1"
AFTER = "resid_pre.2"  # the same rows, read where the next layer finds them


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return Run.open(tiny_run)


@pytest.fixture(scope="module")
def steerer(run: Run) -> Steerer:
    return run.steerer()


@pytest.fixture(scope="module")
def features(run: Run) -> list[int]:
    with run.store() as store:
        table = store.sql("SELECT feature FROM features WHERE p99 > 0 ORDER BY density DESC LIMIT 3")
    return table["feature"].to_pylist()


def rows_after(steerer: Steerer, edits: list[Edit], ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with steerer.applied(edits, **options), capture(steerer.lm.model, [AFTER]) as reader, torch.no_grad():
        return reader.run(ids)[AFTER]


def by_hand(steerer: Steerer, h: torch.Tensor, edit: Edit) -> torch.Tensor:
    """What one edit makes of rows h [..., d], written out mode by mode."""
    assert isinstance(edit.feature, int)
    d, scale, c = (
        steerer.dictionary.W_dec[edit.feature].detach(),
        steerer.scales[edit.feature],
        steerer.median_norms[HOOK],
    )
    unit = d / d.norm()
    latents = steerer.dictionary.encode(h.reshape(-1, h.shape[-1]))
    z = (latents.values * (latents.indices == edit.feature)).sum(1).detach().reshape(h.shape[:-1])[..., None]
    along = (h @ unit)[..., None]
    step = {
        "add": edit.amount * (c * unit if edit.unit == "norm" else scale.p99 * d),
        "clamp": (edit.goal * scale.p99 - z) * d,
        "scale": (edit.goal * z - z) * d,
        "ablate": -z * d,
        "ablate_mean": (scale.mean - z) * d,
        "replace": (edit.goal * c - along) * unit,
        "cap": -(along - edit.goal * c).clamp_min(0) * unit,
        "ablate_direction": -along * unit,
    }[edit.mode]
    return h + step * (1.0 if edit.mode == "add" else edit.amount)


EDITS = [
    Edit(0, "add", 0.5),
    Edit(0, "add", -0.3),
    Edit(0, "add", 2.0, unit="p99"),
    Edit(0, "clamp", to=1.5),
    Edit(0, "clamp", 0.5, to=1.5),
    Edit(0, "scale", to=3.0),
    Edit(0, "ablate"),
    Edit(0, "ablate", 0.25),
    Edit(0, "ablate_mean"),
    Edit(0, "replace", to=0.2),
    Edit(0, "cap", to=0.01),
    Edit(0, "ablate_direction"),
    Edit(0, "ablate_direction", 0.5),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.describe().removeprefix("feature 0, "))
def test_every_mode_is_the_edit_written_out(steerer: Steerer, features: list[int], edit: Edit):
    base = rows_after(steerer, [])
    for feature in features:
        mine = replace(edit, feature=feature)
        expected = by_hand(steerer, base, mine)
        torch.testing.assert_close(rows_after(steerer, [mine]), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows_after(steerer, []), base)


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.describe().removeprefix("feature 0, "))
def test_strength_zero_is_the_model_bit_for_bit(steerer: Steerer, features: list[int], edit: Edit):
    still = replace(edit, feature=features[0], strength=0.0)
    for keep_error in (True, False):
        assert torch.equal(rows_after(steerer, [still], keep_error=keep_error), rows_after(steerer, []))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", {0, 1, 2, 3, 4, 5}),
        ("prompt", {0, 1, 2, 3, 4, 5}),
        ("generated", set()),
        ((0, 3), {0, 3}),
        ((-1, 2), {5, 2}),
    ],
)
def test_positions_of_one_forward_pass(steerer: Steerer, features: list[int], positions, expected: set[int]):
    base = rows_after(steerer, [])
    edit = Edit(features[0], "add", 0.5, positions=positions)
    changed = rows_after(steerer, [edit])
    for place in range(IDS.shape[1]):
        wanted = by_hand(steerer, base, edit)[:, place]
        if place in expected:
            torch.testing.assert_close(changed[:, place], wanted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(changed[:, place], base[:, place])


@pytest.mark.parametrize("schedule", ["constant", "fade:3", "first:2", "every:2"])
@pytest.mark.parametrize(
    ("positions", "changed"),  # of a prompt of four tokens and two written ones
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("prompt", [0, 1, 2, 3]),
        ("generated", [4, 5]),
        ((0, 3), [0, 3]),
        ((-1, 2), [2, 3]),
        ((1, 5), [1, 5]),
    ],
)
def test_every_mode_at_every_rule_of_tokens(
    steerer: Steerer, features: list[int], positions: Any, changed: list[int], schedule: str
):
    """Prompt, then token by token with a cache: each row is the edit written out, times its weight by hand."""
    base = rows_after(steerer, [])
    weight = dict.fromkeys(range(6), 0.0)
    for place in changed:
        count = place - changed[0]
        weight[place] = {
            "constant": 1.0, "fade:3": max(0.0, 1 - count / 3), "first:2": float(count < 2), "every:2": 1.0 - count % 2,
        }[schedule]  # fmt: skip
    weights = torch.tensor([weight[place] for place in range(6)])[None, :, None]
    model = steerer.lm.model
    for edit in EDITS:
        mine = replace(edit, feature=features[0], positions=positions, schedule=schedule)
        seen, cache = [], None
        with steerer.applied([mine]), capture(model, [AFTER]) as reader, torch.no_grad():
            for part in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
                cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
                seen.append(reader.acts[AFTER])
        expected = base + weights * (by_hand(steerer, base, mine) - base)
        torch.testing.assert_close(
            torch.cat(seen, 1), expected, rtol=1e-4, atol=1e-4, msg=lambda m, e=mine: f"{e}: {m}"
        )


def test_padding_and_cache_do_not_move_positions(steerer: Steerer, features: list[int]):
    """Token by token with a cache and padding before the prompt: the same tokens are changed as in one pass."""
    model, edit = steerer.lm.model, Edit(features[0], "add", 0.5, positions=(2, 4))
    whole = rows_after(steerer, [edit], IDS[:1])
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    seen = []
    with steerer.applied([edit]), capture(model, [AFTER]) as reader, torch.no_grad():
        cache = None
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
            where = (mask[:, :stop].cumsum(1) - 1).clamp_min(0)[:, start:stop]
            out = model(input_ids=padded[:, start:stop], attention_mask=mask[:, :stop], position_ids=where,
                        past_key_values=cache, use_cache=True)  # fmt: skip
            cache = out.past_key_values
            seen.append(reader.acts[AFTER])
    torch.testing.assert_close(torch.cat(seen, 1)[:, 2:], whole, rtol=1e-3, atol=1e-3)


def test_prompt_and_generated_part_the_tokens(steerer: Steerer, features: list[int]):
    """Edits on the prompt and on what follows are together the edit on all, and each alone is something else."""

    def text(*positions: Any) -> str:
        edits = [Edit(features[0], "add", 0.8, positions=p) for p in positions]
        return steerer.generate("The river", edits, max_new_tokens=12)

    assert text("all") == text("prompt", "generated") != text("prompt")
    assert text("generated") != text()


def test_a_batch_is_its_rows_one_by_one(steerer: Steerer, features: list[int]):
    prompts = ["The river", "In the year of the great flood, the"]
    edits = [Edit(features[0], "add", 0.5, positions=(-1,)), Edit(features[1], "scale", to=2.0, positions="generated")]
    together = steerer.generate_all(prompts, edits, max_new_tokens=8)
    assert together == [steerer.generate(p, edits, max_new_tokens=8) for p in prompts]
    for changed in (edits, [Edit(features[0], "add", 0.5)], [Edit(features[1], "clamp", to=1.0, schedule="fade:4")]):
        half = steerer.generate_all(prompts, changed, only=[False, True], max_new_tokens=8)
        assert half == [steerer.generate(p, e, max_new_tokens=8) for p, e in zip(prompts, ([], changed), strict=True)]


def test_schedules(steerer: Steerer, features: list[int]):
    assert [schedule_factor("fade:4", n) for n in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [schedule_factor("first:2", n) for n in range(4)] == [1, 1, 0, 0]
    assert [schedule_factor("every:2", n) for n in range(4)] == [1, 0, 1, 0]
    base = rows_after(steerer, [])
    full = by_hand(steerer, base, Edit(features[0], "add", 0.5)) - base
    for schedule in ("fade:3", lambda n: max(0.0, 1 - n / 3)):
        moved = rows_after(steerer, [Edit(features[0], "add", 0.5, schedule=schedule)]) - base
        weights = torch.tensor([1, 2 / 3, 1 / 3, 0, 0, 0])
        torch.testing.assert_close(moved, full * weights[None, :, None], rtol=1e-3, atol=1e-3)


def test_several_edits_at_once(steerer: Steerer, features: list[int]):
    """Activations and additions see the same rows; directions are taken out after them, in the order given."""
    base = rows_after(steerer, [])
    first, second = Edit(features[0], "ablate"), Edit(features[1], "clamp", to=2.0)
    third = Edit(features[2], "ablate_direction")
    summed = by_hand(steerer, base, first) + by_hand(steerer, base, second) - base
    torch.testing.assert_close(rows_after(steerer, [first, second]), summed, rtol=1e-4, atol=1e-4)
    expected = by_hand(steerer, summed, third)
    torch.testing.assert_close(rows_after(steerer, [third, first, second]), expected, rtol=1e-4, atol=1e-4)


def test_without_the_error_the_reconstruction_is_in_place(steerer: Steerer, features: list[int]):
    base, edit = rows_after(steerer, []), Edit(features[0], "add", 0.5, positions=(1, 4))
    with torch.no_grad():
        rebuilt = steerer.dictionary.decode(steerer.dictionary.encode(base.reshape(-1, base.shape[-1])))
    rebuilt = rebuilt.reshape(base.shape)
    changed = rows_after(steerer, [edit], keep_error=False)
    step = by_hand(steerer, base, edit) - base
    torch.testing.assert_close(changed[:, [1, 4]], (rebuilt + step)[:, [1, 4]], rtol=1e-4, atol=1e-4)
    assert torch.equal(changed[:, [0, 2, 3, 5]], base[:, [0, 2, 3, 5]])


def test_no_trace_after_a_thousand_entries(steerer: Steerer, features: list[int]):
    """Random nesting, leaving and exceptions: the model has the hooks and the output that it had."""
    model, draw = steerer.lm.model, random.Random(5)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with torch.no_grad():
        before, count = model(IDS).logits, hooks()
    modes = [e for e in EDITS if e.amount]
    for number in range(1000):
        edits = [replace(draw.choice(modes), feature=draw.choice(features)) for _ in range(draw.randint(1, 3))]
        kind = draw.randrange(4)
        if kind == 0:
            with steerer.applied(edits), steerer.applied(edits[:1]):
                pass
        elif kind == 1:
            with pytest.raises(RuntimeError, match="stop"), steerer.applied(edits):
                raise RuntimeError("stop")
        elif kind == 2:
            with pytest.raises(SteerError), steerer.applied([*edits, Edit(10**6)]):
                raise AssertionError("an edit that cannot be made was applied")
        elif number % 20 == 0:
            with steerer.applied(edits), torch.no_grad():
                model(IDS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert hooks() == count


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(-1), "no feature -1: this dictionary has features 0 to 95"),
        (Edit(0, "ad"), "no steering mode 'ad'"),
        (Edit(0, unit="watts"), "no unit 'watts'"),
        (Edit(0, "add", float("nan")), "strength of feature 0 must be a finite number, not nan"),
        (Edit(0, "clamp", to=float("inf")), "to of feature 0 must be a finite number"),
        (Edit(0, "add", 9.0), "strength 9 of feature 0 is beyond 4"),
        (Edit(0, "ablate", to=1.0), "mode ablate has no goal"),
        (Edit(0, positions="everywhere"), "positions are all, prompt, generated"),  # pyright: ignore[reportArgumentType]
        (Edit(0, schedule="slowly"), "a schedule is constant, fade:N"),
    ],
)
def test_bad_edits_are_one_line(steerer: Steerer, edit: Edit, message: str):
    with pytest.raises(SteerError, match=message) as caught:
        steerer.generate("The river", [edit])
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_context_is_refused(steerer: Steerer):
    with pytest.raises(SteerError, match="do not fit the model's context of"):
        steerer.generate("river " * 5000, [])


def test_features_by_id_words_and_sql(run: Run):
    with run.store() as store:
        pattern = Edit(0, "add", 0.2)
        assert [(e.feature, e.amount) for e in chosen(store, pattern, features=["3", "4:0.7"])] == [(3, 0.2), (4, 0.7)]
        found = chosen(store, pattern, where="kind != 'none'", top=2)
        kinds = store.sql("SELECT feature, kind FROM features")
        kind_of = dict(zip(kinds["feature"].to_pylist(), kinds["kind"].to_pylist(), strict=True))
        assert len(found) == 2 and all(kind_of[e.feature] != "none" for e in found)
        hits = [h.feature for h in store.search("river", limit=2)]
        assert [e.feature for e in chosen(store, pattern, search="river", top=2)] == hits

        def refused(message: str, **asked: Any) -> None:
            with pytest.raises(SteerError, match=message):
                chosen(store, pattern, **asked)

        refused("'x' is no feature", features=["x"])
        refused("no feature meets where 'density > 2'", where="density > 2")
        refused("name a feature")
        with pytest.raises(ValueError, match=r"read-only|not allowed|condition"):
            chosen(store, pattern, where="density > 0); DROP TABLE x; --")
