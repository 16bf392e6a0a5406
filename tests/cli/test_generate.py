import subprocess
import sys

import pytest
from click.testing import CliRunner
from PIL import Image
from pipelines import tiny_dit, write_lora

import diffusers_sla.cli.generate
from diffusers_sla import SLAConfig, apply_sla, save_sla_weights
from diffusers_sla.cli import main
from diffusers_sla.generation import Request, generate
from diffusers_sla.lora import add_lora

FEW = ["--steps", "2", "--guidance-scale", "1", "--seed", "3", "--class-label", "dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_dit().save_pretrained(folder)
    return str(folder)


def run(*arguments):
    return CliRunner().invoke(main, ["generate", *arguments])


def expected(config=None):
    pipe = tiny_dit()
    if config is not None:
        apply_sla(pipe, config)
    return generate(pipe, Request(class_label="dog", steps=2, seed=3, guidance_scale=1.0)).frames[0]


@pytest.mark.parametrize("option", ["--sla_config", "--sla-config"])
def test_it_writes_what_the_pipeline_makes_with_sla(model, tmp_path, option):
    result = run("--model", model, *FEW, "--out", str(tmp_path / "x.png"), option, '{"topk": 0.1, "blkq": 32}')
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "x.png")
    assert "2 layers: 4 calls SLA, 0 dense" in result.stderr
    assert Image.open(tmp_path / "x.png").copy() == expected(SLAConfig(topk=0.1, blkq=32))


def test_it_writes_what_the_pipeline_makes_by_itself(model, tmp_path):
    result = run("--model", model, *FEW, "--out", str(tmp_path / "x.png"), "--attention_mechanism", "diffusers")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x.png").copy() == expected()


def test_weights_bring_their_settings(model, tmp_path):
    config = SLAConfig(topk=0.05, blkk=16)
    save_sla_weights(apply_sla(tiny_dit(), config), tmp_path)
    result = run("--model", model, *FEW, "--out", str(tmp_path / "x.png"), "--sla_weights", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x.png").copy() == expected(config)


def test_settings_replace_those_of_the_weights_that_they_name(model, tmp_path):
    save_sla_weights(apply_sla(tiny_dit(), SLAConfig(topk=0.05, blkk=16)), tmp_path)
    out = ["--out", str(tmp_path / "x.png"), "--sla_weights", str(tmp_path)]
    result = run("--model", model, *FEW, *out, "--sla_config", '{"topk": 0.3}')
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x.png").copy() == expected(SLAConfig(topk=0.3, blkk=16))
    assert f"--sla-config replaces settings of {tmp_path}: topk is 0.05 in the file and 0.3 here\n" in result.stderr
    result = run("--model", model, *FEW, *out, "--sla_config", '{"topk": 2}')
    assert result.stderr == "Error: topk must be a number in (0, 1], got 2\n"


def test_the_lora_beside_the_weights_is_used(model, tmp_path):
    pipe = apply_sla(tiny_dit(), SLAConfig(topk=0.05))
    save_sla_weights(pipe, tmp_path)
    write_lora(pipe, tmp_path)
    result = run("--model", model, *FEW, "--out", str(tmp_path / "x.png"), "--sla_weights", str(tmp_path))
    assert result.exit_code == 0, result.output
    add_lora(pipe, tmp_path)
    request = Request(class_label="dog", steps=2, seed=3, guidance_scale=1.0)
    assert Image.open(tmp_path / "x.png").copy() == generate(pipe, request).frames[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sla_config", '{"topk": 0}'], 1, "topk must be a number in (0, 1], got 0"),
        (["--sla_config", '{"topk": 1.5}'], 1, "topk must be a number in (0, 1], got 1.5"),
        (["--sla_config", '{"topk": NaN}'], 1, "topk must be a number in (0, 1], got nan"),
        (["--sla_config", '{"topkk": 0.1}'], 1, "unknown SLA setting 'topkk'; known are topk, blkq"),
        (["--sla_config", '{"topk": 0.1'], 1, "sla_config is neither JSON nor a Python dict"),
        (["--sla_config", '{"feature_map": "gelu"}'], 1, "feature_map must be one of softmax, elu"),
        (["--class-label", "bird"], 1, "there is no class 'bird'; DiTPipeline has the classes cat, dog"),
        (["--prompt", "a cat"], 1, "DiTPipeline takes no prompt; its classes are cat, dog"),
        (["--seed", "-1"], 1, "seed must be a whole number from 0"),
        (["--seed", "x"], 2, "'x' is not a valid integer"),
        (["--out", "x.mp4"], 1, "an image is written as .png, .jpg, .jpeg, .webp, got 'x.mp4'"),
        (["--out", "x.txt"], 1, "an image or video is written as .png"),
        (["--device", "nowhere"], 1, "device 'nowhere' cannot be used"),
        (["--sla_weights", "{tmp}"], 1, "has no sla_attention.pt; save_sla_weights(pipe,"),
        (["--model", "{tmp}"], 1, "model_index.json"),
        (["--model", "{tmp}/nothing"], 1, "cannot be loaded as a pipeline: there is no such folder"),
        (["--attention_mechanism", "flash"], 2, "'flash' is not one of 'sla', 'diffusers'"),
        (["--attention_mechanism", "diffusers", "--sla_config", "{{}}"], 2, "--sla-config has no meaning with"),
    ],
)
def test_bad_input_is_one_clear_line(model, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setattr(diffusers_sla.cli.generate, "generate", None)  # it comes before any work
    arguments = [a if a.startswith('{"') else a.format(tmp=tmp_path) for a in arguments]
    result = run("--model", model, *FEW, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_it_runs_as_a_program(model, tmp_path):
    command = [sys.executable, "-m", "diffusers_sla", "generate", "--model", model, *FEW, "--out", "x.webp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "x.webp\n"), done.stderr
    assert Image.open(tmp_path / "x.webp").size == (64, 64)
