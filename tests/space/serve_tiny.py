"""Serve the Space with tiny random pipelines: `serve_tiny.py FOLDER sample=PORT wan=PORT sdxl=PORT`, or some of them.

FOLDER gets the pipelines and a trained state of each, with a LoRA. tests/ and space_app/ must be on the path.
"""

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import app
import serving
import speed_tab
import torch
from pipelines import make_pipeline, tiny_dit, write_lora

from diffusers_sla import SLAConfig, apply_sla, benchmark, save_sla_weights, sla_parameters

# What takes the place of each model: the pipeline and what its page starts with.
TINY = {
    "sample": (tiny_dit, {"subjects": ("cat", "dog")}),
    "wan": (lambda: make_pipeline("wan"), {"height": 112, "width": 192, "num_frames": 17}),  # 5 x 7 x 12 tokens
    "sdxl": (lambda: make_pipeline("sdxl"), {"height": 64, "width": 64}),  # 256 tokens
}


def records(path):
    """What `diffusers-sla bench --json` writes, of three lengths."""
    cases = [
        benchmark.Case(1, 1, L, 16, "float32", SLAConfig(topk=topk)) for L in (256, 512, 1024) for topk in (0.1, 0.5)
    ]
    measured = benchmark.rates("float32", torch.device("cpu"))
    found = [benchmark.run(case, "cpu", passes=("forward",), repeats=1, measured=measured) for case in cases]
    path.parent.mkdir()
    path.write_text(json.dumps([record.to_dict() for record in found]))


def put_in_place(name, folder):
    """The tiny pipeline `name` and a state for it, into a folder and into MODELS."""
    make, facts = TINY[name]
    pipe = make()
    pipe.save_pretrained(folder / "model")
    apply_sla(pipe)
    with torch.no_grad():
        for parameter in sla_parameters(pipe):
            parameter.normal_()
    save_sla_weights(pipe, folder / "state")
    write_lora(pipe, folder / "state")
    serving.MODELS[name] = replace(
        serving.MODELS[name], title="a tiny pipeline", source=str(folder / "model"), state=str(folder / "state"),
        steps=4, **facts,
    )  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ports = dict(argument.split("=") for argument in sys.argv[2:])
    records(folder / "benchmarks" / "tiny.json")
    speed_tab.HERE = folder
    for name, port in ports.items():
        put_in_place(name, folder / name)
        os.environ["SPACE_MODEL"] = name
        app.main(server_port=int(port), prevent_thread_lock=True)
    threading.Event().wait()
