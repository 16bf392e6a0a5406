import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pipelines import tiny_dit, write_lora

import diffusers_sla.cli.demo
from diffusers_sla import SLAConfig, load_sla_weights, save_sla_weights, sla_layers
from diffusers_sla.cli import main
from diffusers_sla.generation import Request, generate
from diffusers_sla.lora import LORA_NAME, add_lora
from diffusers_sla.weights import apply_sla, settings_for


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *arguments])


def test_it_shows_saves_and_checks(tmp_path):
    model, out, trained = tmp_path / "model", tmp_path / "out", tmp_path / "trained"
    tiny_dit().save_pretrained(model)
    pipe = apply_sla(tiny_dit(), {"topk": 0.3, "blkq": 16, "blkk": 16})
    with torch.no_grad():
        for layer in sla_layers(pipe).values():
            layer.state.proj_l_weight.normal_()
    save_sla_weights(pipe, trained)
    write_lora(pipe, trained)
    result = run(
        "--model", str(model), "--out", str(out), "--class-label", "cat", "--steps", "2", "--topk", "0.25", "--topk",
        "0.1", "--sla-config", '{"blkq": 16, "blkk": 16}', "--sla-weights", str(trained),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the image is identical" in result.stdout
    for word in ("s in attention", "blocks exact", "FLOPs saved", "PSNR", "SSIM", "trained, with its LoRA"):
        assert word in result.stdout
    assert Image.open(out / "comparison.png").width > 500
    again = load_sla_weights(tiny_dit(), out / "sla_attention.pt")
    first = next(iter(sla_layers(again).values()))
    assert first.config.to_dict() == {**first.config.to_dict(), "topk": 0.1, "blkq": 16, "blkk": 16}
    assert torch.equal(first.state.proj_l_weight, next(iter(sla_layers(pipe).values())).state.proj_l_weight)
    assert (out / LORA_NAME).read_bytes() == (trained / LORA_NAME).read_bytes()
    values = json.loads((out / "comparison.json").read_text())
    names = [f"SLA {which}, topk {topk}" for topk in (0.25, 0.1) for which in ("untrained", "trained")]
    assert [r["name"] for r in values["results"]] == ["dense", *names]
    assert [r["exact_share"] for r in values["results"]] == [1.0, 0.25, 0.25, 6 / 64, 6 / 64]
    assert len({r["psnr"] for r in values["results"]}) == 5
    files = {f"sla-{which}-{topk}.png" for topk in (0.25, 0.1) for which in ("untrained", "trained")}
    assert {path.name for path in out.glob("*.png")} == {"comparison.png", "dense.png", *files}
    # what is trained comes back into a pipeline by two lines
    add_lora(again, out)
    request = Request(class_label="cat", steps=2, guidance_scale=None)
    assert generate(again, request).frames[0] == Image.open(out / "sla-trained-0.1.png").copy()
    assert generate(tiny_dit(), request).frames[0] == Image.open(out / "dense.png").copy()


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ([], SLAConfig(topk=0.3, blkq=16, blkk=32)),
        (["--topk", "0.1", "--sla-config", '{"blkq": 64}'], SLAConfig(topk=0.1, blkq=64, blkk=32)),
    ],
)
def test_the_settings_of_the_weights_are_used_but_for_those_given(tmp_path, given, config):
    tiny_dit().save_pretrained(tmp_path / "model")
    save_sla_weights(apply_sla(tiny_dit(), {"topk": 0.3, "blkq": 16, "blkk": 32}), tmp_path / "trained")
    result = run(
        "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--class-label", "cat", "--steps", "1",
        "--sla-weights", str(tmp_path / "trained"), *given,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    untrained, trained = (SLAConfig.parse(r["config"]) for r in results[1:])
    assert untrained == trained == settings_for(tmp_path / "out")[0] == config
    assert ("--sla-config replaces settings of" in result.stderr) == bool(given)


def test_another_image_is_an_error(tmp_path, monkeypatch):
    tiny_dit().save_pretrained(tmp_path / "model")
    load = diffusers_sla.cli.demo.load_sla_weights

    def damaged(pipe, source):
        load(pipe, source)
        with torch.no_grad():
            for layer in sla_layers(pipe).values():
                layer.state.proj_l_weight.normal_()

    monkeypatch.setattr(diffusers_sla.cli.demo, "load_sla_weights", damaged)
    result = run(
        "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--class-label", "0", "--steps", "2"
    )
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout
    assert "is not the one of 'SLA untrained, topk 0.05'" in result.stderr


def test_without_the_sample_a_model_is_asked_for(monkeypatch):
    monkeypatch.setattr(diffusers_sla.cli.demo, "SAMPLE", Path("nowhere"))
    result = run()
    assert result.exit_code == 2
    assert "name a --model" in result.stderr
    assert run("--topk", "0").exit_code != 0
