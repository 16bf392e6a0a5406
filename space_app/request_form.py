"""The inputs that two tabs share, and the request and settings they stand for."""

import itertools
from dataclasses import dataclass
from typing import Any

import gradio as gr
from serving import Served, answered, checked_prompt

from diffusers_sla import SLAConfig
from diffusers_sla.config import BLOCK_SIZES, FEATURE_MAPS, LINEAR_MODES
from diffusers_sla.generation import Request
from diffusers_sla.weights import settings_for

# Those that the form has an input for.
SETTINGS = ("topk", "blkq", "blkk", "feature_map", "linear", "skip", "dense_steps")


@dataclass
class Form:
    """Components, in the order in which `values` takes what they hold."""

    inputs: list[Any]


def build(served: Served, loaded: gr.State) -> Form:
    """Lay out subject, seed, steps and sparsity, with the other settings folded away.

    `loaded`: repository whose projections this visitor loaded, or None; the settings shown become those of its file.
    """
    model = served.model
    if model.takes_classes:
        subject = gr.Dropdown(served.classes, value=model.subjects[0], label="Class", info="What the image shows.")
    else:
        subject = gr.Textbox(
            model.subjects[0], label="Prompt", info="What to generate, in words.", lines=2, max_lines=6
        )
    topk = gr.Slider(
        0.02, 1.0, model.topk, step=0.01, label="Blocks computed exactly (topk)",
        info="Share of key blocks that each query block attends to exactly. Smaller is faster and further from dense.",
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=100)
        steps = gr.Slider(1, model.max_steps, model.steps, step=1, label="Steps", min_width=160)
    with gr.Accordion("More settings", open=False):
        guidance = gr.Slider(1.0, 15.0, model.guidance_scale, step=0.1, label="Guidance", info="1 turns it off.")
        with gr.Row():
            blkq = gr.Dropdown(list(BLOCK_SIZES), value=64, label="Queries per block (blkq)", min_width=120)
            blkk = gr.Dropdown(list(BLOCK_SIZES), value=64, label="Keys per block (blkk)", min_width=120)
        feature_map = gr.Dropdown(
            [name for name in FEATURE_MAPS if name != "hedgehog"],
            value="softmax",
            label="Feature map of the linear branch",
        )
        linear = gr.Dropdown(
            list(LINEAR_MODES), value="all", label="Linear branch", info="Over all blocks, the marginal ones, or none."
        )
        dense = gr.Slider(
            0,
            10,
            model.dense_steps,
            step=1,
            label="First steps kept dense",
            info="The layout of the picture is decided there.",
        )
        skip = gr.Slider(0.0, 0.95, 0.0, step=0.05, label="Blocks left out altogether (skip)")
    loaded.change(
        lambda repository: answered(lambda: _shown(served, repository)), loaded,
        [topk, blkq, blkk, feature_map, linear, skip, dense], api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    return Form([subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense])


def _shown(served: Served, repository: str | None) -> list[Any]:
    """Settings as the form has them: those of the file, or those that the page begins with."""
    model = served.model
    config = SLAConfig(topk=model.topk, dense_steps=list(range(model.dense_steps)))
    maps = [name for name in FEATURE_MAPS if name != "hedgehog"]
    if repository is not None:
        config, _ = settings_for(repository)
        maps = list(dict.fromkeys([*maps, config.feature_map]))
    first_dense = _first_dense(config)
    return [
        gr.Slider(value=config.topk, minimum=min(0.02, config.topk)), config.blkq, config.blkk,
        gr.Dropdown(maps, value=config.feature_map), config.linear, config.skip,
        gr.Slider(value=first_dense, maximum=max(10, first_dense)),
    ]  # fmt: skip


def _first_dense(config: SLAConfig) -> int:
    return next(step for step in itertools.count() if step not in config.dense_steps)


def trained_settings(config: SLAConfig, source: str) -> SLAConfig:
    """What trained projections run with: what the form has an input for, and the rest as their file says."""
    given = {name: getattr(config, name) for name in SETTINGS}
    if _first_dense(config) == _first_dense(settings_for(source)[0]):
        del given["dense_steps"]  # untouched: the file may name others than the first, which the form cannot
    return settings_for(source, given)[0]


def values(served: Served, subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense_steps):
    """(Request, SLAConfig) of what the form holds.

    Raises:
        SLAConfigError: A value is out of range.
        gr.Error: The prompt is empty or too long.
    """
    model = served.model
    if not served.allows(steps):
        raise gr.Error(f"Steps must be from 1 to {model.max_steps}, got {steps!r:.40}.", print_exception=False)
    subject = checked_prompt(subject)
    request = Request(
        prompt=None if model.takes_classes else subject, class_label=subject if model.takes_classes else None,
        seed=seed, steps=int(steps), guidance_scale=guidance, height=model.height, width=model.width,
        num_frames=model.num_frames,
    )  # fmt: skip
    config = SLAConfig(
        topk=topk, blkq=blkq, blkk=blkk, feature_map=feature_map, linear=linear, skip=skip,
        dense_steps=list(range(int(dense_steps))),
    )  # fmt: skip
    return request, config
