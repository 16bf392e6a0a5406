"""Serve the Space with a tiny random pipeline: `serve_tiny.py FOLDER`, which gets the pipeline and a trained state.

tests/ and space_app/ must be on the path.
"""

import sys
from dataclasses import replace
from pathlib import Path

import app
import serving
import torch
from pipelines import tiny_dit

from diffusers_sla import apply_sla, save_sla_weights, sla_parameters

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
        subjects=("cat", "dog"), steps=3,
    )  # fmt: skip
    app.main()
