"""Serve the Space with a tiny random pipeline: `serve_tiny.py FOLDER`, which gets the pipeline and a trained state.

tests/ and space_app/ must be on the path.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import app
import serving
import speed_tab
import torch
from pipelines import tiny_dit

from diffusers_sla import SLAConfig, apply_sla, benchmark, save_sla_weights, sla_parameters


def records(path):
    """What `diffusers-sla bench --json` writes, of three lengths."""
    cases = [
        benchmark.Case(1, 1, L, 16, "float32", SLAConfig(topk=topk)) for L in (256, 512, 1024) for topk in (0.1, 0.5)
    ]
    measured = benchmark.rates("float32", torch.device("cpu"))
    found = [benchmark.run(case, "cpu", passes=("forward",), repeats=1, measured=measured) for case in cases]
    path.parent.mkdir()
    path.write_text(json.dumps([record.to_dict() for record in found]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pipe = tiny_dit()
    pipe.save_pretrained(folder / "model")
    apply_sla(pipe)
    with torch.no_grad():
        for parameter in sla_parameters(pipe):
            parameter.normal_()
    save_sla_weights(pipe, folder / "state")
    serving.MODELS["sample"] = replace(
        serving.MODELS["sample"], title="a tiny pipeline", source=str(folder / "model"), state=str(folder / "state"),
        subjects=("cat", "dog"), steps=4,
    )  # fmt: skip
    records(folder / "benchmarks" / "tiny.json")
    speed_tab.HERE = folder
    app.main()
