"""Evaluation of every form on a tiny real model, against computations that share none of its code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Run, load_config, save_dictionary
from saeql.pipelines.evaluate import EvaluateConfig, Evaluator
from saeql.pipelines.exchange import export_dictionary
from saeql.pipelines.find_dictionary import find_dictionary
from saeql.pipelines.models import ModelMismatch
from saeql.pipelines.splice import Splicer
from saeql.sae.architectures import build
from saeql.sae.config import ConfigError, DictionaryConfig
from saeql.sae.files import DictionaryError
from saeql.sae.hooks import capture
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places
from saeql.store.shards import ShardReader

PLACES = {
    "autoencoder": Places(("resid_post.1",), ("resid_post.1",)),
    "transcoder": Places(("resid_post.0",), ("mlp_out.1",)),
    "skip_transcoder": Places(("resid_post.0",), ("mlp_out.1",)),
    "crosscoder": Places(("mlp_out.1", "resid_post.1"), ("mlp_out.1", "resid_post.1")),
}
NAMES = ("resid_post.0", "mlp_out.1", "resid_post.1")
CONFIG = EvaluateConfig(ce_windows=10, batch_windows=4, num_bootstrap=200)


@pytest.fixture(scope="module")
def harvested(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which only the harvest is done, at three hook points."""
    more = {"model.more_hook_points": '["mlp_out.1", "resid_post.0"]'}
    run = Run.create(tmp_path_factory.mktemp("evaluate") / "run", load_config(tiny_config, more))
    list(run.execute(("harvest",)))
    return run


def made(form: str, architecture: str = "topk") -> SparseAutoencoder:
    """A dictionary that nothing was learned into, with every parameter away from zero."""
    width = 32 * len(PLACES[form].reads)
    dictionary = build(DictionaryConfig(architecture=architecture, form=form, d_sae=64, k=6), width, width, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "W_skip"):
            parameter = getattr(dictionary, name)
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return dictionary


def evaluator(run: Run, folder: Path, config: EvaluateConfig = CONFIG) -> Evaluator:
    """On a copy of the stored rows; the norm limit is low, so that many rows are left out."""
    if not (folder / "activations").exists():
        shutil.copytree(run.activations, folder / "activations")
    info = replace(run.harvest_info, massive_norm_multiple=1.15)
    return Evaluator(run.language_model, folder / "activations", info, config, seed=3)


def stored(run: Run, split: str, name: str) -> torch.Tensor:
    """Rows [W, T, d]."""
    reader = ShardReader(run.activations / name / split)
    return torch.cat([torch.from_numpy(reader.acts(s).copy()) for s in range(len(reader))]).view(-1, 32, 32)


def kept_rows(run: Run, acts: dict[str, torch.Tensor]) -> torch.Tensor:
    limit = {name: 1.15 * run.harvest_info.median_norms[name] for name in acts}
    keep = torch.stack([a.norm(dim=-1) <= limit[name] for name, a in acts.items()]).all(0)
    keep[:, 0] = False
    return keep


@pytest.mark.parametrize("form", list(PLACES))
def test_fvu_of_every_form_is_that_of_a_direct_computation(form: str, harvested: Run, tmp_path: Path):
    dictionary, places = made(form), PLACES[form]
    found = {m["metric"]: m for m in evaluator(harvested, tmp_path).metrics(dictionary, places)}
    acts = {name: stored(harvested, "test", name) for name in dict.fromkeys((*places.reads, *places.writes))}
    keep = kept_rows(harvested, acts)
    assert 0.05 < float(keep.float().mean()) < 0.95
    for suffix, rows in (("", keep), ("_all_rows", torch.ones_like(keep))):
        x, y = (torch.cat([acts[n][rows] for n in names], -1) for names in (places.reads, places.writes))
        with torch.no_grad():
            error = (y - dictionary(x)).double().square()
        spread = (y.double() - y.double().mean(0)).square()
        assert found[f"fvu{suffix}"]["value"] == pytest.approx(float(error.sum() / spread.sum()), rel=1e-5)
        assert found[f"fvu{suffix}"]["n"] == int(rows.sum())
        assert found[f"fvu{suffix}"]["low"] < found[f"fvu{suffix}"]["value"] < found[f"fvu{suffix}"]["high"]
        if form == "crosscoder":
            share = error[:, :32].sum() / spread[:, :32].sum()
            assert found[f"fvu{suffix}@mlp_out.1"]["value"] == pytest.approx(float(share), rel=1e-5)


@pytest.mark.parametrize("form", list(PLACES))
def test_losses_of_every_form_are_those_of_modules_replaced_by_hand(form: str, harvested: Run, tmp_path: Path):
    dictionary, places = made(form), PLACES[form]
    found = {m["metric"]: m["value"] for m in evaluator(harvested, tmp_path).metrics(dictionary, places)}
    windows = torch.tensor(harvested.evidence.read("windows", split="test")["token_ids"].to_pylist())
    chosen = torch.linspace(0, len(windows) - 1, 10, dtype=torch.float64).round().long().unique()
    windows, model = windows[chosen], harvested.language_model.model
    layers = model.model.layers
    modules = {"resid_post.0": layers[0], "mlp_out.1": layers[1].mlp, "resid_post.1": layers[1]}

    def run(new: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-probabilities and activations, with outputs of modules replaced."""
        acts: dict[str, torch.Tensor] = {}

        def hook(name: str):
            def replaced(_module, _args, output):
                acts[name] = output
                return new.get(name, output)

            return replaced

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        with torch.no_grad():
            logits = model(windows, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits[:, :-1].double().log_softmax(-1), acts

    def ce(log_p: torch.Tensor) -> float:
        return -float(log_p.gather(2, windows[:, 1:, None]).mean())

    base, acts = run({})
    read_or_written = {name: acts[name] for name in dict.fromkeys((*places.reads, *places.writes))}
    keep = kept_rows(harvested, read_or_written)
    with torch.no_grad():
        y_hat = dictionary(torch.cat([acts[name] for name in places.reads], -1).flatten(0, 1)).view(*keep.shape, -1)
    parts = dict(zip(places.writes, y_hat.split(32, -1), strict=True))
    train = {name: stored(harvested, "train", name) for name in places.writes}
    train_kept = kept_rows(harvested, train)
    assert found["ce_model"] == pytest.approx(ce(base), rel=1e-5)
    for suffix, rows, train_rows in (
        ("", keep, train_kept), ("_all_rows", torch.ones_like(keep), torch.ones_like(train_kept)),
    ):  # fmt: skip
        means = {name: t[train_rows].mean(0) for name, t in train.items()}
        for kind, value in (("spliced", parts), ("mean", means), ("zero", {n: torch.zeros(32) for n in parts})):
            new = {name: torch.where(rows[..., None], value[name], acts[name]) for name in places.writes}
            log_q, _ = run(new)
            kl = float((base.exp() * (base - log_q)).sum(-1).mean())
            assert found[f"ce_{kind}{suffix}"] == pytest.approx(ce(log_q), rel=1e-5), kind
            name = "kl" if kind == "spliced" else f"kl_{kind}"
            assert found[f"{name}{suffix}"] == pytest.approx(kl, rel=2e-3, abs=1e-7), kind
            if form == "crosscoder" and not suffix:
                alone, _ = run({"mlp_out.1": new["mlp_out.1"]})
                assert found[f"ce_{kind}@mlp_out.1"] == pytest.approx(ce(alone), rel=1e-5), kind
        for ablation, tail in (("mean", ""), ("zero", "_zero")):
            lost = found[f"ce_{ablation}{suffix}"] - found["ce_model"]
            share = 1 - (found[f"ce_spliced{suffix}"] - found["ce_model"]) / lost
            assert found[f"ce_recovered{tail}{suffix}"] == pytest.approx(share)
    assert found["ce_spliced"] != found["ce_spliced_all_rows"]


def test_what_gives_everything_back_costs_nothing(harvested: Run, tmp_path: Path):
    """A skip transcoder that is the identity, from a place to itself."""
    dictionary = made("skip_transcoder", "relu")
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        dictionary.W_skip.copy_(torch.eye(32))
    places = Places(("resid_post.1",), ("resid_post.1",))
    found = {m["metric"]: m for m in evaluator(harvested, tmp_path).metrics(dictionary, places)}
    for suffix in ("", "_all_rows"):
        assert found[f"fvu{suffix}"]["value"] == pytest.approx(0, abs=1e-10)
        assert found[f"ce_increase{suffix}"]["value"] == pytest.approx(0, abs=1e-6)
        assert found[f"kl{suffix}"]["value"] == pytest.approx(0, abs=1e-6)
        assert found[f"cosine{suffix}"]["value"] == pytest.approx(1) == found[f"reconstruction_bias{suffix}"]["value"]
    assert found["l0"]["value"] == 0 and found["dead_share"]["value"] == 1


def test_batch_sizes_change_no_number(harvested: Run, tmp_path: Path):
    dictionary, places = made("autoencoder"), PLACES["autoencoder"]
    found = [
        evaluator(harvested, tmp_path, replace(CONFIG, batch_tokens=size)).metrics(dictionary, places)
        for size in (7, 1000)
    ]
    for mine, theirs in zip(*found, strict=True):
        assert mine == {key: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for key, v in theirs.items()}


def test_baselines_are_measured_once_and_kept(harvested: Run, tmp_path: Path):
    dictionary, places = made("autoencoder"), PLACES["autoencoder"]
    first = evaluator(harvested, tmp_path).metrics(dictionary, places)
    (file,) = (tmp_path / "activations" / "baselines").iterdir()
    assert evaluator(harvested, tmp_path).metrics(dictionary, places) == first
    stored = json.loads(file.read_text())
    stored["zero"][0] = [v + 40 for v in stored["zero"][0]]
    file.write_text(json.dumps(stored))
    again = {m["metric"]: m["value"] for m in evaluator(harvested, tmp_path).metrics(dictionary, places)}
    assert (
        again["ce_zero"] > next(m["value"] for m in first if m["metric"] == "ce_zero") + 1
    )  # it is read, not measured
    evaluator(harvested, tmp_path, replace(CONFIG, ce_windows=5)).metrics(dictionary, places)
    evaluator(harvested, tmp_path).metrics(made("transcoder"), PLACES["transcoder"])
    assert len(list(file.parent.iterdir())) == 3


@pytest.mark.parametrize(
    ("write", "num_layers"), [("resid_post.1", 2), ("resid_pre.1", 1), ("mlp_out.1", 1), ("attn_out.2", 2),
                              ("mlp_out.0", 0), ("lm_head", 0), ("model.embed_tokens", 0)],
)  # fmt: skip
def test_layers_before_a_replacement_are_run_once(write: str, num_layers: int, harvested: Run):
    model = harvested.language_model.model
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    calls = []
    handles = [m.self_attn.q_proj.register_forward_hook(lambda *_, n=n: calls.append(n))
               for n, m in enumerate(model.model.layers)]  # fmt: skip
    forwards = [layer.forward for layer in model.model.layers]
    with torch.no_grad(), Splicer(model, [write], [write]) as splicer:
        base, acts = splicer.run(ids)
        calls.clear()
        assert torch.equal(splicer.again({write: acts[write]}), base)
        assert calls == list(range(num_layers, 3))
        assert not torch.equal(splicer.again({write: acts[write] * 0}), base)
        other, _ = splicer.run(ids + 1)
        assert torch.equal(other, model(ids + 1, use_cache=False).logits)
    for handle in handles:
        handle.remove()
    assert [layer.forward for layer in model.model.layers] == forwards
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, base)


def test_a_model_whose_layers_hand_on_more_is_run_whole(harvested: Run):
    """Layer 0 also leaves something for layer 2, as models do that share keys and values between layers."""
    model, left = harvested.language_model.model, []
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    handles = [
        model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: left.append(output)),
        model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, output: output + left.pop()),
    ]
    with torch.no_grad(), Splicer(model, ["resid_post.1"], ["resid_post.1"]) as splicer:
        base, acts = splicer.run(ids)
        assert torch.equal(splicer.again({"resid_post.1": acts["resid_post.1"]}), base)
    for handle in handles:
        handle.remove()


def test_dictionaries_are_found_wherever_they_are(harvested: Run, tmp_path: Path):
    mine = made("crosscoder")
    mine.config = replace(mine.config, reads=PLACES["crosscoder"].reads, writes=PLACES["crosscoder"].writes)
    save_dictionary(mine, harvested.path / "sweep" / "dictionaries" / "wide")
    name, found, places = find_dictionary(harvested, "wide")
    assert name == "wide" and places == PLACES["crosscoder"] and torch.equal(found.W_dec, mine.W_dec)

    own = made("autoencoder")
    save_dictionary(own, tmp_path / "own")
    export_dictionary(tmp_path / "own", tmp_path / "sparsify", format="sparsify")
    with pytest.raises(ConfigError, match=r"name it with --reads; harvested are resid_post\.1, mlp_out\.1"):
        find_dictionary(harvested, str(tmp_path / "sparsify"))
    _, found, places = find_dictionary(harvested, str(tmp_path / "sparsify"), reads=("mlp_out.1",))
    assert places == Places(("mlp_out.1",), ("mlp_out.1",))
    x = torch.randn(50, 32)
    torch.testing.assert_close(found(x), own(x), rtol=1e-5, atol=1e-6)

    foreign = made("transcoder", "relu")
    foreign.metadata = {"hook_name": "blocks.0.hook_resid_post", "hf_hook_name_out": "model.layers.1.mlp"}
    save_dictionary(foreign, tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "cfg.json").read_text())
    del config["metadata"]["saeql"]
    (tmp_path / "foreign" / "cfg.json").write_text(json.dumps(config))
    assert find_dictionary(harvested, str(tmp_path / "foreign"))[2] == PLACES["transcoder"]


def test_dictionaries_that_do_not_fit_are_refused(harvested: Run, tmp_path: Path):
    with pytest.raises(DictionaryError, match="no dictionary 'wied': neither a path nor one of"):
        find_dictionary(harvested, "wied")
    dictionary = made("autoencoder")
    dictionary.config = replace(dictionary.config, reads=("resid_post.2",), writes=("resid_post.2",))
    save_dictionary(dictionary, tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match=r"reads or writes 'resid_post\.2', which .* has not harvested; .*did you mean"
    ):
        find_dictionary(harvested, str(tmp_path / "elsewhere"))
    save_dictionary(build(DictionaryConfig(d_sae=64, k=6, reads=("mlp_out.1",)), 48, 48, seed=0), tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"reads 48 coordinates, mlp_out\.1 has 32"):
        find_dictionary(harvested, str(tmp_path / "wide"))
    identity = {
        "model_name": "other",
        "model_sha256": "0" * 64,
        "tokenizer_sha256": "0" * 64,
        "hook_point": "mlp_out.1",
    }
    dictionary.config = replace(dictionary.config, reads=("mlp_out.1",), writes=("mlp_out.1",))
    dictionary.metadata = {"saeql": {"identity": identity}}
    save_dictionary(dictionary, tmp_path / "other")
    with pytest.raises(ModelMismatch, match="trained on other"):
        find_dictionary(harvested, str(tmp_path / "other"))
    assert find_dictionary(harvested, str(tmp_path / "other"), allow_mismatch=True)[0] == "other"


def test_captured_rows_are_not_changed_by_splicing(harvested: Run):
    model = harvested.language_model.model
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), capture(model, list(NAMES)) as reader:
        expected = reader.run(ids)
    with torch.no_grad(), Splicer(model, NAMES, ["mlp_out.1", "resid_post.1"]) as splicer:
        _, acts = splicer.run(ids)
        splicer.again({"mlp_out.1": torch.zeros(2, 9, 32)})
        assert all(torch.equal(acts[name], expected[name]) for name in NAMES)
