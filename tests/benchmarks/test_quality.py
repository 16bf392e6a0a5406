"""The quality benchmark runs, resumes and reports; its figures come from benchmarks/quality/run.py on a GPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import tiny_dit, write_lora

from diffusers_sla import apply_sla, load_sla_weights, save_sla_weights, sla_parameters

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def quality(monkeypatch):
    """Its modules: a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(str(QUALITY))
    import measure
    import report
    import rows
    import run

    yield measure, report, rows, run
    for name in ("measure", "report", "rows", "run", "train_sample"):
        sys.modules.pop(name, None)


@pytest.fixture
def command(quality, tmp_path, monkeypatch):
    tiny_dit().save_pretrained(tmp_path / "pipeline")
    generator = np.random.default_rng(0)
    photos = {name: generator.integers(0, 255, (90, 120, 3), dtype="uint8") for name in ("cat", "dog")}
    np.savez(tmp_path / "photos.npz", **photos)

    def call(*more):
        arguments = [
            "run.py", "--photos", tmp_path / "photos.npz", "--pipeline", tmp_path / "pipeline", "--out",
            tmp_path / "out", "--seeds", 1, "--steps", 2, "--batch", 2, "--crops", 2, "--held-out", 2, "--images", 2,
            "--image-steps", 2, "--calibration-samples", 2, "--calibration-steps", 2, *more,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        quality[3].main()
        return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]

    return call


def test_a_run_measures_every_cell_once_and_the_report_shows_them(quality, command, tmp_path, monkeypatch, capsys):
    names = ["full attention", "SLA all", "linear only", "L+S, no projection"]
    lines = command("--rows", *names)
    cells = [(line["row"], line["stage"]) for line in lines]
    assert cells == [
        ("full attention", "before"), ("full attention", "tuned"), ("SLA all", "before"), ("SLA all", "calibrated"),
        ("SLA all", "tuned"), ("SLA all", "both"), ("L+S, no projection", "before"), ("L+S, no projection", "tuned"),
        ("linear only", "before"), ("linear only", "tuned"),
    ]  # fmt: skip
    by = {(line["row"], line["stage"]): line for line in lines}
    dense = by["full attention", "before"]
    assert dense["attention_error"] == 0
    assert dense["psnr"] > 90
    assert dense["ssim"] == pytest.approx(1)
    assert by["SLA all", "calibrated"]["psnr"] > by["SLA all", "before"]["psnr"]
    assert all(line["loss"] > 0 for line in lines)
    assert len({line["loss"] for line in lines}) == len(lines)
    assert "nothing is left" in capsys.readouterr().out
    assert command("--rows", *names) == lines  # nothing is done again
    with pytest.raises(SystemExit, match="of other settings"):
        command("--steps", 3)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "out")])
    quality[1].main()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| SLA all | both |" in table
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert summary["rows"]["SLA all"]["tuned"]["loss"][0] == by["SLA all", "tuned"]["loss"]


def test_projections_alone_leave_the_backbone_and_are_kept(command, tmp_path):
    lines = command("--rows", "full attention", "SLA marginal", "--train", "projection")
    assert [(line["row"], line["stage"]) for line in lines] == [
        ("full attention", "before"), *(("SLA marginal", s) for s in ("before", "calibrated", "tuned", "both")),
    ]  # fmt: skip
    pipe = tiny_dit()
    load_sla_weights(pipe, tmp_path / "out" / "states" / "SLA marginal, both")
    assert all(parameter.any() for parameter in sla_parameters(pipe))


def test_a_run_out_of_time_says_what_is_left(command, capsys):
    lines = command("--rows", "full attention", "sparse only", "--minutes", 0.0001)
    assert len(lines) <= 1
    assert "cells are left" in capsys.readouterr().out


def test_ssim_is_that_of_scikit_image(quality):
    skimage = pytest.importorskip("skimage.metrics")
    a = torch.rand(2, 3, 40, 40)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    expected = [
        skimage.structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    assert quality[0].ssim(a, b) == pytest.approx(np.mean(expected), abs=0.01)  # it pads, ours does not
    assert quality[0].ssim(a, a) == pytest.approx(1)
    assert quality[0].psnr(a, b) == pytest.approx(20, abs=1)


def test_states_are_measured_with_their_lora(quality, command, tmp_path, monkeypatch, capsys):
    import states

    for name in ("zero", "lora"):
        save_sla_weights(apply_sla(tiny_dit(), {"topk": 0.1}), tmp_path / name)
    write_lora(tiny_dit(), tmp_path / "lora")
    arguments = [
        "states.py", "--photos", tmp_path / "photos.npz", "--pipeline", tmp_path / "pipeline", "--held-out", 2,
        "--images", 2, "--image-steps", 2, tmp_path / "lora", tmp_path / "zero",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    states.main()
    dense, untrained, lora, zero = map(json.loads, capsys.readouterr().out.splitlines())
    assert dense.keys() == {"state", "loss"}
    names = ("loss", "attention_error", "psnr", "ssim")
    assert [untrained[name] for name in names] == [zero[name] for name in names]
    assert [x["lora"] for x in (untrained, zero, lora)] == [False, False, True]
    assert lora["loss"] != zero["loss"] != dense["loss"]
    assert lora["psnr"] < zero["psnr"] < 90  # a random one


def test_per_head_fits_are_no_worse_than_the_shared_one(quality, tmp_path, monkeypatch, capsys):
    import per_head

    tiny_dit().save_pretrained(tmp_path)
    arguments = ["per_head.py", "--pipeline", str(tmp_path), "--samples", "4", "--steps", "2", "--topk", "0.1"]
    monkeypatch.setattr(sys, "argv", arguments)
    per_head.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    none, shared, heads, from_shared = map(float, lines[-1].split()[-4:])
    assert heads <= none
    assert from_shared <= shared < none
