"""Steering vectors: planted directions are found by every method, files come back the same, parts are found again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.steering.decompose import decompose
from saeql.pipelines.steering.edits import Edit, SteerError
from saeql.pipelines.steering.gguf_vectors import load_gguf, save_gguf
from saeql.pipelines.steering.reading import METHODS, ReadingError, direction, read_rows, unembedding_direction
from saeql.pipelines.steering.vector_files import check_name
from saeql.pipelines.steering.vectors import SteeringVector, VectorError
from saeql.sae.hooks import capture

HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return Run.open(tiny_run)


def planted(seed: int = 0, n: int = 200, d: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of rows that differ along one direction, and by noise that is larger along another."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(d, generator=draw), dim=0)
    noise = torch.randn(2, n, d, generator=draw) * 0.3
    base = torch.randn(n, d, generator=draw)
    return base + 2 * truth + noise[0], base + noise[1], truth


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_planted_direction(method: str):
    positive, negative, truth = planted()
    found = direction(method, positive, negative)
    assert torch.nn.functional.cosine_similarity(found, truth, dim=0) > 0.9
    assert float(found.norm()) == pytest.approx(2, rel=0.15)  # how far apart the means are along it
    swapped = direction(method, negative, positive)
    torch.testing.assert_close(swapped, -found, rtol=1e-2, atol=1e-2)


def test_rows_of_texts_are_the_models_own(run: Run):
    lm, texts = run.language_model, ["the river", "a flood of the old city", "king"]
    last, every = read_rows(lm, HOOK, texts), read_rows(lm, HOOK, texts, "all")
    for n, text in enumerate(texts):
        ids = torch.tensor([[lm.bos_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with capture(lm.model, [HOOK]) as reader, torch.no_grad():
            own = reader.run(ids)[HOOK][0, 1:].float()
        torch.testing.assert_close(last[n], own[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read_rows(lm, HOOK, [text], "mean")[0], own.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(every[: len(own)], own, rtol=1e-4, atol=1e-4)
        every = every[len(own) :]
    assert len(every) == 0


def test_unembedding_direction_raises_its_token(run: Run):
    lm = run.language_model
    token = lm.tokenizer.decode([40])
    found = unembedding_direction(lm, [token])
    logits = lm.model.get_output_embeddings().weight.float() @ found
    assert int(logits.argmax()) == 40 or float(logits[40]) > float(logits.quantile(0.99))
    with pytest.raises(ReadingError, match="tokens of this model, not one"):
        unembedding_direction(lm, ["a river and a city"])


@pytest.mark.parametrize("name", ["v.safetensors", "v.gguf"])
def test_files_come_back_the_same(run: Run, tmp_path: Path, name: str):
    row = torch.randn(32)
    vector = SteeringVector("calm", {HOOK: row}, {HOOK: 3.5}, "m", "sha", "diff_mean", {"rows": "last"})
    path = tmp_path / name
    if name.endswith("gguf"):
        save_gguf(vector, path, model_type="llama", num_layers=3, strength=0.5)
        back = load_gguf(path)
        torch.testing.assert_close(back.rows[HOOK], row * 0.5)
        assert back.name == "calm"
    else:
        vector.save(path)
        back = SteeringVector.load(path)
        assert torch.equal(back.rows[HOOK], row) and back.median_norms == {HOOK: 3.5}
        assert (back.name, back.model_sha256, back.details) == ("calm", "sha", {"rows": "last"})


def test_gguf_as_its_readers_expect_it(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    vector = SteeringVector("v", {"resid_post.1": torch.ones(4), "resid_post.2": torch.full((4,), 2.0)}, {})
    reader = gguf.GGUFReader(str(save_gguf(vector, tmp_path / "v.gguf", model_type="llama", num_layers=3)))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert {t.name: (list(t.shape), float(t.data[0]), t.tensor_type.name) for t in reader.tensors} == {
        "direction.1": ([4], 1.0, "F32"), "direction.2": ([4], 2.0, "F32"),
    }  # fmt: skip


def test_damaged_and_foreign_files_are_one_line(tmp_path: Path):
    from safetensors.torch import save_file

    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF nothing")
    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    for name, message in (
        ("missing.safetensors", "no steering vector at"),
        ("cut.safetensors", "is no safetensors file"),
        ("other.safetensors", "is no steering vector of saeql"),
    ):
        with pytest.raises(VectorError, match=message):
            SteeringVector.load(tmp_path / name)
    for name, message in (("v.txt", "written as .safetensors or .gguf"), ("no/v.gguf", "there is no folder")):
        with pytest.raises(VectorError, match=message):
            check_name(tmp_path / name)
    with pytest.raises(VectorError, match="is no GGUF file"):
        load_gguf(tmp_path / "cut.gguf")
    with pytest.raises(VectorError, match="zero or not finite"):
        SteeringVector("v", {HOOK: torch.zeros(4)}, {}).save(tmp_path / "zero.safetensors")
    for place in ("resid_post.0", "mlp_out.1", "resid_post.3"):
        with pytest.raises(VectorError, match=f"not at {place}"):
            save_gguf(SteeringVector("v", {place: torch.ones(4)}, {}), tmp_path / "v", model_type="x", num_layers=3)


def test_a_sum_of_features_is_taken_apart_again():
    draw = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(400, 64, generator=draw), dim=1)
    parts = {7: 3.0, 90: 2.0, 311: 1.0}
    vector = sum(c * rows[f] for f, c in parts.items())
    assert isinstance(vector, torch.Tensor)
    found = decompose(vector, rows, max_features=3, stop=0.0)
    assert [p.feature for p in found.parts] == list(parts)
    assert [p.coefficient for p in found.parts] == pytest.approx(list(parts.values()), rel=1e-3)
    assert found.residual_share[-1] < 1e-6 and list(found.residual_share) == sorted(found.residual_share)[::-1]
    against = decompose(-rows[7], rows, max_features=50)
    assert all(p.coefficient > 0 for p in against.parts) and 7 not in {p.feature for p in against.parts}
    with pytest.raises(ValueError, match="zero or not finite"):
        decompose(torch.zeros(64), rows)
    with pytest.raises(ValueError, match="64 wide"):
        decompose(torch.ones(3), rows)


def test_steering_by_a_vector_is_the_edit_written_out(run: Run):
    steerer, row = run.steerer(), torch.randn(32, generator=torch.Generator().manual_seed(2))
    model, ids = run.language_model.model, torch.tensor([[1, 5, 9, 11]])
    vector = SteeringVector("v", {HOOK: row}, {HOOK: 2.0})

    def rows_after(*edits: Edit) -> torch.Tensor:
        with steerer.applied(edits), capture(model, ["resid_pre.2"]) as reader, torch.no_grad():
            return reader.run(ids)["resid_pre.2"]

    base, unit = rows_after(), row / row.norm()
    for edit, expected in (
        (Edit(vector, "add", 0.5), base + 0.5 * 2.0 * unit),
        (Edit(vector, "add", 1.5, unit="raw"), base + 1.5 * row),
        (Edit(vector, "ablate_direction"), base - (base @ unit)[..., None] * unit),
        (Edit(vector, "replace", to=0.5), base + (1.0 - base @ unit)[..., None] * unit),
    ):
        torch.testing.assert_close(rows_after(edit), expected, rtol=1e-4, atol=1e-4)
    other = SteeringVector("elsewhere", {"mlp_out.0": row}, {"mlp_out.0": 1.0})
    assert not torch.allclose(rows_after(Edit(other, "add", 2.0)), base)
    assert torch.equal(rows_after(Edit(other, "add", 0.0)), base)
    for bad, message in (
        (Edit(vector, "clamp"), "vector v is a direction without activations"),
        (Edit(SteeringVector("w", {HOOK: torch.ones(3)}, {HOOK: 1.0})), "is 3 wide at resid_post.1, the model 32"),
        (Edit(SteeringVector("w", {"mlp_out.0": row}, {})), "does not say how large activations are at mlp_out.0"),
        (Edit(SteeringVector("w", {HOOK: row}, {}, "their", "abc")), "was made with their, which is not"),
    ):
        with pytest.raises(SteerError, match=message):
            rows_after(bad)


def test_a_vector_from_files_to_steered_text(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "good.txt").write_text("the river is calm\nthe city is old\nthe king\n")
    (tmp_path / "bad.txt").write_text("a flood\na war of the king\n")
    out = tmp_path / "v.safetensors"
    main(["vector", str(run.path), "--positive", str(tmp_path / "good.txt"), "--negative", str(tmp_path / "bad.txt"),
          "--out", str(out), "--json"])  # fmt: skip
    made = json.loads(capsys.readouterr().out)
    assert made["made_by"] == "diff_mean" and made["positive"] == 3 and 0 < made["left_over"] < 1
    assert made["parts"] and {"feature", "coefficient", "cosine", "label"} <= made["parts"][0].keys()
    main(["vector", str(run.path), "--of", str(out), "--out", str(tmp_path / "v.gguf")])
    assert "of its squared norm is in no feature above" in capsys.readouterr().out
    for file in (out, tmp_path / "v.gguf"):
        main(["steer", str(run.path), "--vector", str(file), "--unit", "raw", "--strength", "3", "--tokens", "5",
              "--prompt", "The river", "--json"])  # fmt: skip
        assert json.loads(capsys.readouterr().out)["texts"][0]["steered"]
    with pytest.raises(SystemExit):
        main(["vector", str(run.path), "--positive", str(tmp_path / "good.txt")])
    assert "is no {" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the package of llama.cpp is for Linux")
def test_llama_cpp_adds_our_control_vector_where_our_hook_does():
    script = Path(__file__).parents[2] / "scripts" / "check_control_vector.py"
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "writes another text with the vector on 6 of 6" in told.stdout, told.stdout[-2000:]
