"""`diffusers-sla generate`: one image or video from any diffusers pipeline, dense or with SLA."""

import sys
from pathlib import Path

import click

from ..apply import apply_sla, sla_layers
from ..config import SLAConfig
from ..generation import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Request,
    check_output,
    check_suffix,
    generate,
    load_pipeline,
    save_frames,
)
from ..lora import add_lora, lora_beside
from ..weights import load_sla_weights
from .options import (
    check_unread,
    device_options,
    dtype_of,
    progress,
    quieten_diffusers,
    request_options,
    weights_settings,
)


@click.command("generate")
@click.option("--model", required=True, metavar="PATH_OR_REPO", help="A pipeline: a folder or a Hub repository.")
@click.option(
    "--attention-mechanism", "--attention_mechanism", type=click.Choice(["sla", "diffusers"]), default="sla",
    show_default=True, help="SLA, or the model's own attention.",
)  # fmt: skip
@click.option(
    "--sla-config",
    "--sla_config",
    metavar="JSON",
    help="""Settings, such as '{"topk": 0.15, "blkq": 32}'; of --sla-weights those not named stay.""",
)
@click.option(
    "--sla-weights", "--sla_weights", metavar="PATH_OR_REPO",
    help="A sla_attention file, or what holds one; the LoRA beside it in a folder is used too. Without it the "
    "projections are zero.",
)  # fmt: skip
@request_options
@device_options
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("out.png"), show_default=True,
    help="File to write: .png, .jpg, .webp; .mp4, .gif for videos.",
)  # fmt: skip
@click.option(
    "--fps", type=click.IntRange(1, 240), default=16, show_default=True, help="Frames per second of a video."
)
def command(model, attention_mechanism, sla_config, sla_weights, device, dtype, out, fps, **wanted):
    """Generate one image or video.

    \b
    Examples:
      diffusers-sla generate --model space_app/sample_pipeline --class-label coins --out coins.png
      diffusers-sla generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --num-frames 81 --out cat.mp4
    """
    quieten_diffusers()
    if attention_mechanism == "diffusers":
        check_unread("--attention-mechanism diffusers", sla_config=sla_config, sla_weights=sla_weights)
    request = Request(**wanted)
    check_suffix(out, tuple(dict.fromkeys(IMAGE_SUFFIXES + VIDEO_SUFFIXES)), "an image or video")
    config = SLAConfig.parse(sla_config) if sla_weights is None else weights_settings(sla_weights, sla_config)
    pipe = load_pipeline(model, device, dtype_of(dtype))
    request.arguments(pipe)
    check_output(out, request.makes_video(pipe))
    if attention_mechanism == "sla":
        if sla_weights is None:
            apply_sla(pipe, config)
        else:
            load_sla_weights(pipe, sla_weights, config=config, override=True)
            lora = lora_beside(sla_weights)
            if lora is not None:
                add_lora(pipe, lora)
    with progress(pipe, request.num_steps(pipe), attention_mechanism) as bar:
        result = generate(pipe, request, on_step=lambda done, total: bar.update())
    print(save_frames(result.frames, out, fps))
    if attention_mechanism == "sla":
        layers = sla_layers(pipe).values()
        calls = sum(layer.calls_sla for layer in layers)
        dense = sum(sum(layer.calls_dense.values()) for layer in layers)
        print(f"{result.seconds:.1f} s; {len(layers)} layers: {calls} calls SLA, {dense} dense", file=sys.stderr)
    else:
        print(f"{result.seconds:.1f} s", file=sys.stderr)
