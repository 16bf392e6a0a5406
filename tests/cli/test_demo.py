import json
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image
from pipelines import tiny_dit

import diffusers_sla.cli.demo
from diffusers_sla import load_sla_weights, save_sla_weights, sla_layers
from diffusers_sla.cli import main
from diffusers_sla.weights import apply_sla


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
    result = run(
        "--model", str(model), "--out", str(out), "--class-label", "cat", "--steps", "2", "--topk", "0.25", "--topk",
        "0.1", "--sla-config", '{"blkq": 16, "blkk": 16}', "--sla-weights", str(trained),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the image is identical" in result.stdout
    for word in ("s in attention", "blocks exact", "FLOPs saved", "PSNR", "SSIM", "SLA, topk 0.25", "SLA, topk 0.1"):
        assert word in result.stdout
    assert Image.open(out / "comparison.png").width > 500
    again = load_sla_weights(tiny_dit(), out / "sla_attention.pt")
    first = next(iter(sla_layers(again).values()))
    assert first.config.to_dict() == {**first.config.to_dict(), "topk": 0.25, "blkq": 16, "blkk": 16}
    assert torch.equal(first.state.proj_l_weight, next(iter(sla_layers(pipe).values())).state.proj_l_weight)
    values = json.loads((out / "comparison.json").read_text())
    assert [r["name"] for r in values["results"]] == ["dense", "SLA, topk 0.25", "SLA, topk 0.1"]
    assert [r["exact_share"] for r in values["results"]] == [1.0, 0.25, 6 / 64]
    assert {path.name for path in out.glob("*.png")} == {"comparison.png", "dense.png", "sla-0.25.png", "sla-0.1.png"}


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
    assert "is not the one of 'SLA, topk 0.1'" in result.stderr


def test_without_the_sample_a_model_is_asked_for(monkeypatch):
    monkeypatch.setattr(diffusers_sla.cli.demo, "SAMPLE", Path("nowhere"))
    result = run()
    assert result.exit_code == 2
    assert "name a --model" in result.stderr
    assert run("--topk", "0").exit_code != 0
