"""`diffusers-sla demo`: one image, dense and with SLA, and what SLA did."""

import json
import os
import shutil
from pathlib import Path

import click

from ..config import SLAConfig
from ..errors import SLAError
from ..generation import Request, load_pipeline, save_frames
from ..lora import LORA_NAME, add_lora, lora_beside
from ..state import PT_NAME
from ..weights import load_sla_weights, save_sla_weights
from .options import (
    device_options,
    dtype_of,
    needs_extra,
    progress,
    quieten_diffusers,
    request_options,
    weights_settings,
)

SAMPLE = Path(__file__).parents[2] / "space_app" / "sample_pipeline"


@click.command("demo")
@click.option("--model", metavar="PATH_OR_REPO", help="A pipeline. Default: the sample in the project's repository.")
@click.option(
    "--topk", type=float, multiple=True,
    help="Share of key blocks computed exactly; may be given several times. Default: that of --sla-weights, or 0.05.",
)  # fmt: skip
@click.option(
    "--sla-config",
    "--sla_config",
    metavar="JSON",
    help="Other settings. Those not named are those of --sla-weights, or the defaults.",
)
@click.option(
    "--sla-weights",
    "--sla_weights",
    metavar="PATH_OR_REPO",
    help="Trained projections, shown beside untrained ones; the LoRA beside them in a folder is used too. "
    "Default: the sample's, none for others.",
)
@request_options
@device_options
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("outputs/demo"), show_default=True
)
@needs_extra("demo", "matplotlib", "skimage")
def command(model, topk, sla_config, sla_weights, device, dtype, out, **wanted):
    """Generate the same image dense, with SLA untrained and trained, and show time, arithmetic and difference.

    Writes the images, a picture of them beside block maps, comparison.json and sla_attention.pt (with the LoRA, if
    there is one); then loads that into a fresh pipeline and checks that it makes the last image again.

    \b
    Examples:
      diffusers-sla demo
      diffusers-sla demo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --topk 0.1 --prompt "a cat on the grass"
    """
    from ..compare import Variant, compare
    from ..inside import look_inside
    from ..pictures import comparison_picture

    quieten_diffusers()
    if model is None:
        model = SAMPLE
        if not SAMPLE.is_dir():
            raise click.UsageError("the sample pipeline comes with the project's repository only; name a --model")
        wanted = _sample_defaults(wanted)
        sla_weights = sla_weights or SAMPLE.with_name("sample_state")
    if sla_weights is None:
        base = SLAConfig.parse(sla_config, SLAConfig(topk=0.05))
    else:
        base = weights_settings(sla_weights, sla_config)
    lora = lora_beside(sla_weights)
    variants = []
    for value in topk or (base.topk,):
        config = SLAConfig.parse({"topk": value}, base)
        variants.append(Variant(name=f"SLA untrained, topk {value:g}", config=config))
        if sla_weights is not None:
            variants.append(Variant(name=f"SLA trained, topk {value:g}", config=config, state=sla_weights, lora=lora))
    request = Request(**wanted)
    pipe = load_pipeline(model, device, dtype_of(dtype))
    request.arguments(pipe)
    steps = request.num_steps(pipe)

    with progress(pipe, steps * (len(variants) + 2), "dense") as bar:

        def advance(name, done, total):
            bar.set_description(name, refresh=False)
            bar.update()

        comparison = compare(pipe, request, variants, on_progress=advance)
        with variants[-1].installed(pipe):
            save_sla_weights(pipe, out)
        fresh = load_pipeline(model, device, dtype_of(dtype))
        fresh.set_progress_bar_config(disable=True)
        load_sla_weights(fresh, out / PT_NAME)
        if lora is not None:
            add_lora(fresh, shutil.copy(lora, out))
        else:  # an earlier run's does not belong to this state
            (out / LORA_NAME).unlink(missing_ok=True)
        inside = look_inside(
            fresh, request, step=(steps + 1) // 2, on_step=lambda done, total: advance(f"from {PT_NAME}", done, total)
        )
    saved = comparison.results[-1]
    same = saved.frames == inside.frames

    title = f"{type(pipe).__name__}, seed {request.seed}, {steps} steps, {comparison.dtype} on {comparison.device}"
    trained = "none" if sla_weights is None else os.path.relpath(sla_weights) + (", with its LoRA" if lora else "")
    click.echo(f"\n{title}\ntrained: {trained}\n\n{comparison}\n")
    suffix = ".png" if len(saved.frames) == 1 else ".gif"
    for result in comparison.results:
        save_frames(result.frames, out / f"{result.name.lower().replace(', topk ', '-').replace(' ', '-')}{suffix}")
    picture = out / "comparison.png"
    comparison_picture(comparison, _few_views(list(inside.layers.values())), title).save(picture)
    (out / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
    click.echo(f"{picture}: the images, and the block maps of step {inside.step}")
    click.echo(f"{out / PT_NAME}: loaded into a fresh pipeline, the image is {'identical' if same else 'DIFFERENT'}")
    if not same:
        raise SLAError(f"the image from {out / PT_NAME} is not the one of {saved.name!r}")


def _sample_defaults(wanted):
    """The sample pipeline's own values, where the user names none."""
    defaults = {"class_label": "temple", "steps": 10, "guidance_scale": 2.0}
    return wanted | {name: value for name, value in defaults.items() if wanted[name] is None}


def _few_views(layers):
    """(layer, head) pairs for a row of pictures: three layers, two heads of each."""
    picked = {0: None, len(layers) // 2: None, len(layers) - 1: None}
    return [(layers[i], head) for i in picked for head in range(min(2, len(layers[i].block_map)))]
