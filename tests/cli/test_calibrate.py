import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, WanTransformer3DModel
from pipelines import SIZES, make_pipeline

from diffusers_sla import load_sla_weights, sla_layers
from diffusers_sla.cli import main
from diffusers_sla.state import read_state
from diffusers_sla.training.calls import record_calls

CONFIG = '{"topk": 0.25, "blkq": 16, "blkk": 16}'


def call(*arguments):
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path):
    def save(name):
        make_pipeline(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_classes_need_no_prompts(saved, tmp_path):
    result = call(
        "--model", saved("dit"), "--out", tmp_path / "out", "--samples", 2, "--steps", 2, "--guidance-scale", 1,
        "--sla-config", CONFIG,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "attention, mean of 2 layers:" in result.output
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    state = read_state(tmp_path / "out" / "sla_attention.pt")
    assert set(report["layers"]) == set(state.layers)
    assert state.settings["topk"] == report["settings"]["topk"] == 0.25
    for name, layer in report["layers"].items():
        assert ("proj_s.weight" in state.layers[name]) == (layer["ridge_s"] is not None)


@torch.no_grad()
def test_a_folded_backbone_computes_the_same_with_the_folded_state(saved, tmp_path):
    sizes = [x for key, value in SIZES["wan"].items() for x in (f"--{key.replace('_', '-')}", value)]
    (tmp_path / "prompts.txt").write_text("a red cat\n\nphoto of a dog\n")
    base = [
        "--model", saved("wan"), "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--steps", 2,
        "--guidance-scale", 1, "--sla-config", CONFIG, *sizes,
    ]  # fmt: skip
    for out, more in (("plain", []), ("folded", ["--fold"])):
        result = call(*base, "--out", tmp_path / out, *more)
        assert result.exit_code == 0, result.output
    assert "folded proj_s of 2 layers into transformer" in result.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "wan")
    with record_calls(pipe) as calls:
        pipe("a dog", num_inference_steps=2, guidance_scale=1.0, output_type="latent", **SIZES["wan"])
    load_sla_weights(pipe, tmp_path / "plain")
    assert all(layer.state.proj_s_weight is not None for layer in sla_layers(pipe).values())
    folded = WanTransformer3DModel.from_pretrained(tmp_path / "folded", subfolder="transformer")
    load_sla_weights(folded, tmp_path / "folded")
    assert all(layer.state.proj_s_weight is None for layer in sla_layers(folded).values())
    for one in calls:
        torch.testing.assert_close(one.run(folded), one.run(pipe.transformer), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ([], 2, "calibration needs prompts"),
        (["--prompt", "a", "--samples", 1], 2, "1 is not in the range"),
        (["--prompt", "a", "--sla-config", "{"], 1, "neither JSON nor a Python dict"),
        (["--prompts", "EMPTY"], 1, "has no prompt in it"),
        (["--prompt", "a", "--height", 7], 1, "height must be a whole number from 8"),
    ],
)
def test_wrong_usage_is_one_line(saved, tmp_path, more, code, message):
    (tmp_path / "empty.txt").write_text("\n")
    more = [tmp_path / "empty.txt" if word == "EMPTY" else word for word in more]
    result = call("--model", saved("wan"), "--out", tmp_path / "out", *more)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
