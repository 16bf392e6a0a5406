"""`diffusers-sla calibrate`: projections in closed form, without training."""

import sys
from pathlib import Path

import click
from diffusers.utils import logging
from tqdm import tqdm

from ..apply import denoisers
from ..config import SLAConfig
from ..errors import SLAConfigError
from ..generation import Request, load_pipeline
from ..training.calibration import calibrate
from ..training.fold import fold_proj_s
from ..weights import save_sla_weights
from .options import device_options, dtype_of


@click.command("calibrate")
@click.option("--model", required=True, metavar="PATH_OR_REPO", help="A pipeline: a folder or a Hub repository.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the result.")
@click.option("--prompt", "prompts", multiple=True, help="Text or class; may be given often.")
@click.option("--prompts", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One a line.")
@click.option(
    "--samples", type=click.IntRange(2), default=16, show_default=True, help="To generate, each with its own seed."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first sample.")
@click.option(
    "--sla-config", "--sla_config", metavar="JSON", help="""Settings, such as '{"topk": 0.05, "blkq": 64}'."""
)
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 turns it off.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--num-frames", type=int, help="Frames of a video.")
@device_options
@click.option("--fold", is_flag=True, help="Move proj_s into the backbone's output projections and save it too.")
def command(model, out, prompts, file, samples, seed, sla_config, device, dtype, fold, **size):
    """Fit SLA's projections to a pipeline's dense attention: closed form, no gradients, no data set.

    Generates a few samples dense, fits on three of four, and keeps in each layer only what helps on the rest. Writes
    sla_attention.pt, sla_attention.safetensors and calibration.json. Pipelines that take classes use all of theirs
    where no --prompt is given.

    \b
    Examples:
      diffusers-sla calibrate --model space_app/sample_pipeline --sla-config '{"topk": 0.05}' --out calibrated
      diffusers-sla calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out calibrated
    """
    logging.set_verbosity_error()
    config = SLAConfig.parse(sla_config) if sla_config is not None else None
    if file is not None:
        prompts += tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
        if not prompts:
            raise SLAConfigError(f"{file} has no prompt in it")
    pipe = load_pipeline(model, device, dtype_of(dtype))
    classes = list(getattr(pipe, "labels", {}))
    texts = prompts or classes
    if not texts:
        raise click.UsageError("calibration needs prompts: --prompt or --prompts")
    key = "class_label" if classes else "prompt"
    requests = [Request(**{key: texts[i % len(texts)]}, seed=seed + i, **size) for i in range(samples)]
    for request in requests:
        request.arguments(pipe)
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=samples, desc="calibrate", unit="sample") as bar:
        report = calibrate(pipe, requests, config, on_sample=lambda done, total: bar.update())
    print(report)
    if fold:
        folded = fold_proj_s(pipe)
        for component, denoiser in denoisers(pipe).items():
            denoiser.save_pretrained(out / component)
        print(f"folded proj_s of {len(folded)} layers into {', '.join(denoisers(pipe))}")
    errors = {f"mean error {when}": report.mean(f"error_{when}") for when in ("before", "after")}
    fitted = {"method": "closed-form calibration, no training", "samples": samples, "folded": fold} | errors
    save_sla_weights(pipe, out, meta={"training": fitted})
    (out / "calibration.json").write_text(report.to_json() + "\n")
    print(f"wrote {out}", file=sys.stderr)
