"""Look inside: which blocks a layer keeps, where a query block looks, how far off it is, what each branch adds."""

import html

import gradio as gr
import numpy as np
import request_form
from PIL import Image
from serving import Progress, Served, answered, on_gpu, streamed

from diffusers_sla.compare import Variant
from diffusers_sla.inside import Inside, look_inside
from diffusers_sla.lora import lora_beside
from diffusers_sla.pictures import block_map_image, branch_images, where_a_block_looks


def build(served: Served, loaded: gr.State) -> None:
    """Lay out the tab. `loaded`: repository whose projections this visitor loaded, or None."""
    kept = gr.State(None, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            form = request_form.build(served, loaded)
            at = gr.Slider(
                1, served.model.max_steps, max(3, (served.model.steps + 1) // 2), step=1, label="Step to look at",
                info="From noise (1) to the finished image.",
            )  # fmt: skip
            with gr.Row():
                run = gr.Button("Generate and look", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            status = gr.HTML("", label="Progress", padding=False)
        with gr.Column(scale=3, min_width=280):
            with gr.Row():
                layer = gr.Dropdown([], label="Layer", min_width=160)
                head = gr.Slider(0, 1, 0, step=1, label="Head", min_width=120)
                block = gr.Slider(0, 1, 0, step=1, label="Query block", info="Or click on the image.", min_width=120)
            frame = gr.Slider(
                0, 1, 0, step=1, label="Frame", info="As the model has them: each stands for a few of the video.",
                visible=served.is_video,
            )  # fmt: skip
            with gr.Row():
                looks = gr.Image(
                    label="Where this block looks",
                    elem_id="looks",
                    format="png",
                    type="pil",
                    interactive=False,
                    height=320,
                )
                blocks = gr.Image(label="Block map", format="png", type="pil", interactive=False, height=320)
            gr.HTML(
                "<p class='hint'>The chosen query block is red, the keys it attends to exactly are bright. The block "
                "map has a row per query block and a column per key block: "
                "<span class='key critical'></span>critical: exact <span class='key marginal'></span>marginal: linear "
                "branch <span class='key negligible'></span>negligible: left out</p>",
                padding=False,
            )
            with gr.Row():
                sparse = gr.Image(
                    label="What the sparse branch adds", format="png", type="pil", interactive=False, height=240
                )
                linear = gr.Image(
                    label="What the linear branch adds", format="png", type="pil", interactive=False, height=240
                )
            words = gr.Markdown("Press **Generate and look**. Then choose a layer, a head and a query block.")
            errors = gr.HTML("", label="Relative error, layer by layer", padding=False)

    views = [looks, blocks, sparse, linear, words]

    @on_gpu(lambda *inputs: served.gpu_seconds(inputs[3], 1))
    def on_run(
        subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense_steps,
        step, repository
    ):  # fmt: skip
        fields = (subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense_steps)
        request, config = answered(lambda: request_form.values(served, *fields))
        if step <= dense_steps:
            raise gr.Error(
                f"The first {dense_steps} steps run dense here: look at a later one.", print_exception=False
            )
        state = repository or served.trained()
        if state:
            config = answered(lambda: request_form.trained_settings(config, state))

        def work(on_progress):
            variant = Variant(name="SLA", config=config, state=state, lora=lora_beside(state))
            with variant.installed(served.pipe):
                inside = look_inside(
                    served.pipe, request, step=int(step), on_step=lambda done, total: on_progress("SLA", done, total)
                )
            _thin_out(inside)
            return inside

        for inside in streamed(served, work):
            if isinstance(inside, Progress):
                yield [str(inside), *[gr.skip()] * (len(outputs) - 1)]
        names = list(inside.layers)
        name = names[len(names) // 2]
        heads, num_blocks = inside.layers[name].block_map.shape[:2]
        at_frame = _frame_of(inside, name, num_blocks // 2)
        yield [
            "", *_draw(inside, name, 0, num_blocks // 2, at_frame), _bars(inside), inside,
            gr.Dropdown([(_short(n), n) for n in names], value=name), gr.Slider(0, max(1, heads - 1), 0, step=1),
            gr.Slider(0, max(1, num_blocks - 1), num_blocks // 2, step=1),
            gr.Slider(0, max(1, len(inside.frames) - 1), at_frame, step=1),
        ]  # fmt: skip

    outputs = [status, *views, errors, kept, layer, head, block, frame]
    running = run.click(
        on_run, [*form.inputs, at, loaded], outputs, api_name="inside", concurrency_id="model", concurrency_limit=1,
        show_progress="hidden",
    )  # fmt: skip
    stop.click(None, None, None, cancels=[running], api_visibility="private").then(
        lambda: "<p class='hint'>Stopped.</p>", None, status, api_visibility="private"
    )
    quiet = dict(api_visibility="private", show_progress="hidden")
    for component in (layer, head, frame):
        component.input(_redraw, [kept, layer, head, block, frame], views, **quiet)
    block.input(_followed, [kept, layer, block], frame, **quiet).then(
        _redraw, [kept, layer, head, block, frame], views, **quiet
    )
    looks.select(_clicked, [kept, layer, frame], block, **quiet).then(
        _redraw, [kept, layer, head, block, frame], views, **quiet
    )


def _redraw(inside, name, head, block, frame):
    if inside is None:
        raise gr.Error("Please press Generate and look first.", print_exception=False)
    return answered(lambda: _draw(inside, name, head, block, frame))


def _followed(inside, name, block):
    """The frame of the chosen query block."""
    return gr.skip() if inside is None else answered(lambda: _frame_of(inside, name, block))


def _frame_of(inside: Inside, name: str, block: int) -> int:
    view = inside.layers[name]
    t, rows, columns = view.grid(inside.frames)
    return min(int(block) * view.config.blkq // (rows * columns), t - 1) * len(inside.frames) // t


def _thin_out(inside: Inside) -> None:
    """Of a video, keep the frames that the tokens tell apart: what a visitor looks at stays in memory for an hour."""
    count, t = len(inside.frames), max(view.grid(inside.frames)[0] for view in inside.layers.values())
    inside.frames = [inside.frames[-(-i * count // t)] for i in range(t)]


def _draw(inside: Inside, name: str, head: int, block: int, frame: int) -> list:
    """Pictures and words of one layer, head, query block and frame."""
    view = inside.layers[name]
    frame = min(int(frame), len(inside.frames) - 1)
    heads, num_q_blocks, num_k_blocks = view.block_map.shape
    head, block = min(int(head), heads - 1), min(int(block), num_q_blocks - 1)
    row = view.block_map[head, block]
    sparse, linear = branch_images(view, inside.frames, head, frame)
    share = float(view.linear_norm[head].mean() / (view.sparse_norm[head].mean() + 1e-12))
    text = sum(view.kept)
    words = (
        f"Layer **{_short(name)}**, head {head}, step {inside.step}: query block {block} attends exactly to "
        f"**{int((row == 1).sum())} of {num_k_blocks}** key blocks{_in_frames(view, inside, row)}. The linear branch "
        f"adds {share:.0%} of what the sparse one does; the layer's output is **{inside.errors[name]:.1%}** off dense "
        "attention." + (f" {text} text tokens are always attended to." if text else "")
    )
    looks = where_a_block_looks(view, inside.frames, head, block)
    picture, sparse, linear = (_large(picture) for picture in (looks[frame], sparse, linear))
    return [picture, block_map_image(view.block_map[head]), sparse, linear, words]


def _in_frames(view, inside: Inside, row) -> str:
    """Over how many frames a query block's critical blocks spread."""
    t, rows, columns = view.grid(inside.frames)
    if t == 1:
        return ""
    tokens = np.arange(t * rows * columns)
    seen = np.unique(tokens[row[tokens // view.config.blkk] == 1] // (rows * columns))
    return f", in {len(seen)} of {t} frames"


def _enlargement(width: int) -> int:
    return max(1, 512 // width)


def _large(picture):
    factor = _enlargement(picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _bars(inside: Inside) -> str:
    """Relative error of every layer, as bars."""
    top = max(inside.errors.values()) or 1.0
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(_short(name))}</th><td class='bar'>"
        f"<div style='width:{100 * error / top:.1f}%'></div></td><td>{error:.1%}</td></tr>"
        for name, error in inside.errors.items()
    )
    return (
        "<table class='numbers bars'><caption>Error of each layer's output against dense attention on the same "
        f"queries, keys and values</caption><tbody>{rows}</tbody></table>"
    )


def _clicked(inside, name, frame, event: gr.SelectData):
    """The query block under a click on the image."""
    if inside is None or name not in inside.layers:
        return gr.skip()
    view, factor = inside.layers[name], _enlargement(inside.frames[0].width)
    x, y = (int(position) // factor for position in event.index)
    return answered(lambda: view.block_at(x, y, inside.frames, int(frame)))


def _short(name: str) -> str:
    return name.replace("transformer_blocks.", "block ").replace("transformer.", "").replace(".attn1", "")
