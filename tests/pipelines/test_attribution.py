"""Attribution against effects computed by plain hooks and closed forms, for every architecture; and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeql.pipelines import Run, load_config
from saeql.pipelines.attribution.agreement import agreement
from saeql.pipelines.attribution.attributor import Attributor
from saeql.pipelines.attribution.causes import Why
from saeql.pipelines.attribution.feeds import LaterDictionary, feeds
from saeql.pipelines.attribution.of_run import later_dictionary
from saeql.pipelines.attribution.target import WhyError
from saeql.pipelines.cli import main
from saeql.pipelines.models import ModelMismatch
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig
from saeql.sae.model import SparseAutoencoder

PROMPT = "The river bank and the blue house of stone"
HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return Run.open(tiny_run)


@pytest.fixture(scope="module")
def answer(run: Run) -> Why:
    return run.why(PROMPT, " Paris", against=" water", top=10_000, ablate=10_000)


def ids_of(run: Run) -> torch.Tensor:
    lm = run.attributor.lm
    return torch.tensor([[lm.bos_id, *lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])


def with_rows(run: Run, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Logits [V] of the last position with what layer 1 gives changed, by a plain torch hook."""
    layer = run.attributor.lm.model.model.layers[1]

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    handle = layer.register_forward_hook(after)
    try:
        return run.attributor.lm.model(ids).logits[0, -1]
    finally:
        handle.remove()


def difference(run: Run, logits: torch.Tensor) -> torch.Tensor:
    paris, water = (run.attributor.lm.tokenizer(t)["input_ids"][-1] for t in (" Paris", " water"))
    return logits[paris] - logits[water]


def test_attributions_and_ablations_are_those_of_plain_hooks(run: Run, answer: Why):
    ids, dictionary = ids_of(run), run.dictionary()
    seen: list[torch.Tensor] = []

    def keep(h: torch.Tensor) -> torch.Tensor:
        seen.append(h.detach().clone().requires_grad_())
        return seen[-1]

    base = difference(run, with_rows(run, ids, keep))
    gradient = torch.autograd.grad(base, seen[0])[0][0]  # [T, d]
    h = seen[0][0].detach()
    with torch.no_grad():
        latents = dictionary.encode(h[1:])
        assert answer.value == pytest.approx(float(base), abs=1e-5)
        expected = {
            (int(f), t + 1): (float(z), float(gradient[t + 1] @ dictionary.W_dec[f] * z))
            for t in range(len(h) - 1)
            for f, z in zip(latents.indices[t], latents.values[t], strict=True)
            if z > 0
        }
        assert {(p.feature, p.position) for p in answer.pairs} == expected.keys()
        for pair in answer.pairs:
            z, attribution = expected[pair.feature, pair.position]
            assert pair.activation == pytest.approx(z, rel=1e-4, abs=1e-5)
            assert pair.attribution == pytest.approx(attribution, rel=1e-3, abs=1e-5)

            def ablated(rows: torch.Tensor, pair: Any = pair, z: float = z) -> torch.Tensor:
                rows = rows.clone()
                rows[0, pair.position] -= z * dictionary.W_dec[pair.feature]
                return rows

            without = difference(run, with_rows(run, ids, ablated))
            assert pair.exact == pytest.approx(float(base - without), abs=1e-5)

        def no_error(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.clone()
            rows[0, 1:] = dictionary(rows[0, 1:])
            return rows

        wholes = {w.part: w for w in answer.wholes}
        without = difference(run, with_rows(run, ids, no_error))
        assert wholes["error"].exact == pytest.approx(float(base - without), abs=1e-5)


def test_sums_over_tokens_and_features_are_one(answer: Why):
    wholes = {w.part: w for w in answer.wholes}
    total = sum(p.attribution for p in answer.pairs)
    assert wholes["features"].attribution == pytest.approx(total, abs=1e-4)
    assert sum(f.attribution for f in answer.features) == pytest.approx(total, abs=1e-4)
    assert sum(t.features for t in answer.by_token) == pytest.approx(total, abs=1e-4)
    assert sum(t.error for t in answer.by_token) == pytest.approx(wholes["error"].attribution, abs=1e-4)
    parts = wholes["features"].attribution + wholes["error"].attribution
    assert wholes["everything"].attribution == pytest.approx(parts, abs=1e-4)
    assert answer.by_token[0].features == answer.by_token[0].error == 0 and answer.by_token[0].feature is None
    sizes = [abs(p.attribution) for p in answer.pairs]
    assert sizes == sorted(sizes, reverse=True)


def test_integrated_gradients_add_up_to_the_whole_difference(run: Run, answer: Why):
    def gap(why: Why) -> float:
        whole = next(w for w in why.wholes if w.part == "everything")
        return abs(whole.attribution - whole.exact) / abs(whole.exact)

    fine = run.why(PROMPT, " Paris", against=" water", steps=64, ablate=0)
    assert gap(fine) < 0.02 < gap(answer)


def test_what_follows_a_position_has_no_say(run: Run):
    prompt_end = "The river bank"
    at = len(run.attributor.lm.tokenizer(prompt_end, add_special_tokens=False)["input_ids"])
    early = run.why(PROMPT, " Paris", position=at)
    alone = run.why(prompt_end, " Paris")
    assert early == alone
    assert run.why(prompt_end).rank == 1
    ids = ids_of(run)[0, : at + 1].tolist()
    assert run.why(ids, " Paris") == alone
    log = run.why(prompt_end, " Paris", measure="logprob")
    assert log.value == pytest.approx(float(np.log(log.probability)), abs=1e-4)


ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu")


def dictionary_of(architecture: str, form: str = "autoencoder", seed: int = 0) -> SparseAutoencoder:
    """A random dictionary of 64 latents, of which many are active on rows of the tiny model."""
    torch.manual_seed(seed)
    config = DictionaryConfig(architecture=architecture, form=form, d_sae=64, k=6, reads=(HOOK,), writes=(HOOK,))
    made = build(config, 32, 32, seed=seed)
    with torch.no_grad():
        if architecture == "gated":
            for name in ("r_mag", "b_mag"):
                getattr(made, name).copy_(0.01 * torch.rand(64))
        if architecture in ("relu", "gated"):
            made.b_enc.fill_(-0.005)
        if architecture == "jumprelu":
            made.load_extra({"threshold": torch.full((64,), 0.005)})
        made.b_dec.normal_(std=0.02)  # about as large as activations
        if made.W_skip is not None:
            made.W_skip.normal_(std=0.1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_taken_apart_whole(run: Run, architecture: str):
    attributor = Attributor(run.attributor.lm, dictionary_of(architecture), [HOOK], [HOOK], {})
    why = attributor.why(PROMPT, " Paris", steps=48, ablate=500)
    whole = {w.part: w for w in why.wholes}["everything"]
    assert len(why.pairs) > 20
    assert whole.attribution == pytest.approx(whole.exact, rel=0.05, abs=0.01)
    both = next(a for a in why.agreements if a.sample == "both")
    assert both.n == len(why.pairs) and both.pearson is not None and both.pearson > 0.9


@pytest.mark.parametrize("form", ["transcoder", "skip_transcoder"])
def test_transcoders_are_read_at_one_place_and_explained_at_another(run: Run, form: str):
    made = dictionary_of("relu", form)
    attributor = Attributor(run.attributor.lm, made, ["mlp_in.1"], ["mlp_out.1"], {})
    why = attributor.why(PROMPT, " Paris", steps=48, ablate=500)
    parts = {w.part: w for w in why.wholes}
    assert ("skip" in parts) == (form == "skip_transcoder")
    added = sum(w.attribution for name, w in parts.items() if name != "everything")
    assert added == pytest.approx(parts["everything"].attribution, abs=1e-4)
    assert parts["everything"].attribution == pytest.approx(parts["everything"].exact, rel=0.05, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_feeding_next_door_is_decoder_times_encoder(run: Run, architecture: str):
    """resid_pre.2 is resid_post.1: the derivative is known, and small changes are exactly it."""
    lm, first, second = run.attributor.lm, dictionary_of("relu"), dictionary_of(architecture, seed=1)
    first.W_dec.mul_(1e-3)  # so small that hardly any later feature switches
    attributor = Attributor(lm, first, [HOOK], [HOOK], {})
    later = LaterDictionary(second, ["resid_pre.2"], {}, attributor)
    feature = attributor.why(PROMPT, ablate=0).features[0].feature
    found = feeds(attributor, feature, later, PROMPT, top=1000)
    from saeql.sae.hooks import capture

    with capture(lm.model, [HOOK]) as reader:
        h = reader.run(ids_of(run))[HOOK][0, 1:]

    def dense(made: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
        latents = made.encode(x)
        return torch.zeros(len(x), 64).scatter_add(1, latents.indices.long(), latents.values)

    z = dense(first, h)[:, feature]
    before, after = dense(second, h), dense(second, h - z[:, None] * first.W_dec[feature])
    expected, steady = (before - after).sum(0), ((before > 0) == (after > 0)).all(0)
    listed = {f.feature: f for f in found.fed}
    for f in expected.nonzero()[:, 0].tolist():
        assert listed[f].exact == pytest.approx(float(expected[f]), rel=1e-3, abs=1e-6)
        if steady[f]:
            assert listed[f].linear == pytest.approx(float(expected[f]), rel=2e-2, abs=1e-5)
    assert found.num_appearing == int(((before <= 0) & (after > 0)).sum())
    assert found.num_vanishing == int(((before > 0) & (after <= 0)).sum())
    stay = int(((before > 0) & (after > 0)).sum())
    assert found.agreement_staying.n == stay == found.agreement.n - found.num_vanishing
    assert int(steady.sum()) > 55 and found.agreement.spearman is not None and found.agreement.spearman > 0.9


def test_feeding_through_a_layer_agrees_with_ablation(run: Run):
    first = dictionary_of("relu")
    first.W_dec.mul_(0.05)  # small changes are linear in any layer
    earlier = Attributor(run.attributor.lm, first, ["resid_post.0"], ["resid_post.0"], {})
    later = LaterDictionary(dictionary_of("relu", seed=1), [HOOK], {}, earlier)
    feature = earlier.why(PROMPT, ablate=0).features[0].feature
    found = feeds(earlier, feature, later, PROMPT)
    assert found.agreement.n >= 30 and found.agreement.pearson is not None and found.agreement.pearson > 0.95
    with pytest.raises(WhyError, match=r"resid_post.1 is not after resid_post.1"):
        feeds(run.attributor, 0, later, PROMPT)
    with pytest.raises(WhyError, match="no feature 64: this dictionary has features 0 to 63"):
        feeds(earlier, 64, later, PROMPT)
    silent = next(f for f in range(64) if f not in {p.feature for p in earlier.why(PROMPT, ablate=0).pairs})
    with pytest.raises(WhyError, match=f"feature {silent} is not active on this prompt"):
        feeds(earlier, silent, later, PROMPT)


def test_agreement_says_what_cannot_be_correlated():
    assert agreement("x", [1.0, 2.0, 3.0, 5.0], [1.0, 4.0, 9.0, 25.0]).spearman == pytest.approx(1)
    assert agreement("x", [1.0, 2.0], [1.0, 2.0]) == replace(agreement("x", [], []), n=2)
    assert agreement("x", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).pearson is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": "river " * 400}, r"the prompt is \d+ tokens long, the model's context 256"),
        ({"token": " river bank"}, r"' river bank' is 2 tokens of this model, not one: \[ river\] \[ bank\]"),
        ({"token": "zq"}, "is 2 tokens of this model"),
        ({"token": " Paris", "against": " Paris"}, "their difference is always 0"),
        ({"position": 99}, r"no position 99: the prompt has tokens 0 \(the first\) to"),
        ({"position": 0}, "position 0 is the first token"),
        ({"measure": "odds"}, "no measure 'odds': there is logit, logprob"),
        ({"steps": 0}, "steps are 1 to 256"),
    ],
)
def test_bad_questions_are_one_line(run: Run, asked: dict[str, Any], message: str):
    with pytest.raises(WhyError, match=message) as caught:
        run.why(**{"prompt": PROMPT, **asked})
    assert "\n" not in str(caught.value)


def test_crosscoders_and_dictionaries_of_other_models_are_refused(run: Run):
    lm, made = run.attributor.lm, dictionary_of("topk")
    with pytest.raises(WhyError, match="a crosscoder writes 2 hook points"):
        Attributor(lm, made, [HOOK, "resid_post.2"], [HOOK, "resid_post.2"], {})
    identity = {**run.dictionary().metadata["saeql"]["identity"], "model_sha256": "0" * 64}
    with pytest.raises(ModelMismatch, match="was trained on"):
        Attributor(lm, made, [HOOK], [HOOK], {"identity": identity})
    with pytest.raises(ModelMismatch, match="was trained on"):
        LaterDictionary(made, ["resid_post.2"], {"identity": identity}, run.attributor)


def test_the_command_prints_tables_json_csv_and_what_is_fed(
    tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def told(*argv: object) -> str:
        main(["why", str(tiny_run), "--prompt", PROMPT, *map(str, argv)])
        return capsys.readouterr().out

    text = told("--token", " Paris", "--top", 3)
    assert 'logit of " Paris"' in text and "what the dictionary does not explain" in text and "Spearman" in text
    record = json.loads(told("--json", "--top", 3))
    assert len(record["features"]) == 3 and {w["part"] for w in record["wholes"]} == {"features", "error", "everything"}
    assert record["agreements"][1]["sample"] == "random" and record["agreements"][1]["n"] > 20
    lines = told("--csv", "--top", 2).splitlines()
    assert lines[0].startswith("part,feature,label") and lines[1].startswith("feature,") and "error," in lines[-1]

    keys = {"model.hook_point": "resid_post.2", "train.num_steps": "5", "train.warmup_steps": "1"}
    later = Run.create(tmp_path / "later", load_config(tiny_config, keys))
    list(later.execute(("harvest", "train")))
    feature = record["features"][0]["feature"]
    fed = json.loads(told("--feature", feature, "--feeds", tmp_path / "later", "--json"))
    assert fed["later"] == "resid_post.2" and fed["agreement"]["n"] > 0 and fed["fed"]
    assert "feeds at resid_post.2" in told("--feature", feature, "--feeds", later.dictionary_path)

    run = Run.open(tiny_run)
    attributor = Run(tiny_run, run.config).attributor
    main(["export", str(tmp_path / "later"), str(tmp_path / "foreign"), "--format", "sparsify"])
    found, owner = later_dictionary(run, attributor, str(tmp_path / "foreign"), "resid_post.2")
    assert found.reads == "resid_post.2" and owner is None
    capsys.readouterr()
    for argv, message in (
        (("--feature", "1"), "give both, or neither"),
        (("--feature", "1", "--feeds", "nothing"), "no dictionary 'nothing'"),
        (("--json", "--csv"), "name one format"),
        (("--feature", "1", "--feeds", "topk_96_k4", "--token", " Paris"), "leave --token"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["why", str(tiny_run), "--prompt", PROMPT, *argv])
        assert message in capsys.readouterr().err
