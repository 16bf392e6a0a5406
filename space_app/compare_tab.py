"""Compare: one seed, dense and with SLA, side by side."""

import contextlib
import html
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import gradio as gr
import request_form
from serving import Progress, Served, answered, on_gpu, streamed

from diffusers_sla.compare import Comparison, Variant, compare
from diffusers_sla.generation import save_frames
from diffusers_sla.lora import lora_beside

TRAINED, UNTRAINED = "SLA, trained", "SLA, untrained"
VIDEOS = Path(tempfile.gettempdir()) / "sla-space-videos"
KEPT_SECONDS = 3600
# Run once per page. Two videos that loop by themselves drift apart: both start again when both have ended, and what a
# visitor does to one (play, pause, seek) happens to the other.
IN_STEP = """
() => {
  const pair = () => [...document.querySelectorAll('#side-by-side video')];
  const play = (video) => video.play().catch(() => {});
  const start = () => {
    const videos = pair();
    if (videos.length < 2 || videos.some((video) => video.readyState < 2)) return;
    videos.forEach((video) => { video.muted = video.playsInline = true; video.currentTime = 0; });
    videos.forEach(play);
  };
  const on = (event, act) => document.addEventListener(event, ({ target }) => {
    const videos = pair();
    if (videos.length === 2 && videos.includes(target)) act(target, videos.find((video) => video !== target));
  }, true);
  on('loadeddata', start);
  on('ended', (one, other) => { if (other.ended) start(); });
  on('play', (one, other) => { if (other.paused && other.readyState >= 2) play(other); });
  on('pause', (one, other) => { if (one.paused && !one.ended) other.pause(); });
  on('seeking', (one, other) => {
    if (Math.abs(one.currentTime - other.currentTime) > 0.05) other.currentTime = one.currentTime;
  });
}
"""


def build(served: Served, loaded: gr.State) -> None:
    """Lay out the tab. `loaded`: repository whose projections this visitor loaded, or None."""
    results = gr.State([], time_to_live=KEPT_SECONDS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            form = request_form.build(served, loaded)
            both = gr.Checkbox(
                served.trained() is not None, label="With and without trained projections",
                info="Shows what training adds. Without trained projections there is only the second.",
            )  # fmt: skip
            with gr.Row():
                run = gr.Button("Compare", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=280, elem_id="side-by-side"):
            show = gr.Radio([], label="Left and right", visible=False)
            if served.is_video:
                with gr.Row():
                    pictures = [gr.Video(label=side, autoplay=True) for side in ("Left", "Right")]
            else:
                pictures = [gr.ImageSlider(label="Left: dense. Right: SLA.", format="png", type="pil", max_height=560)]
            cards = gr.HTML(_waiting(served), label="Numbers", padding=False)
            with gr.Accordion("All numbers as JSON", open=False):
                numbers = gr.JSON(label="Numbers", show_label=False)

    def seconds(*inputs):
        *fields, with_untrained, repository = inputs
        trained = repository or served.trained()
        return served.gpu_seconds(fields[3], 2 + bool(trained and with_untrained))

    @on_gpu(seconds)
    def on_run(
        subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense_steps,
        with_untrained, repository
    ):  # fmt: skip
        fields = (subject, topk, seed, steps, guidance, blkq, blkk, feature_map, linear, skip, dense_steps)
        request, config = answered(lambda: request_form.values(served, *fields))
        variants = answered(lambda: _variants(config, repository or served.trained(), with_untrained))

        def work(on_progress):
            return compare(served.pipe, request, variants, warm_up=not served.on_cpu, on_progress=on_progress)

        for comparison in streamed(served, work):
            if isinstance(comparison, Progress):
                yield [*[gr.skip()] * len(pictures), str(comparison), gr.skip(), gr.skip(), gr.skip()]
        names = [result.name for result in comparison.results]
        pairs = [f"{left} | {right}" for i, left in enumerate(names) for right in names[i + 1 :]]
        kept = {result.name: _shown(result.frames) for result in comparison.results}
        yield [
            *_pair(served, kept, pairs[0]), _cards(comparison, served), comparison.to_dict(),
            gr.Radio(pairs, value=pairs[0], visible=len(pairs) > 1), kept,
        ]  # fmt: skip

    @on_gpu(lambda subject, seed: served.gpu_seconds(served.model.steps, 2))
    def on_example(subject, seed):
        """The example's comparison with the page's own settings; Gradio keeps it for the next visitor."""
        model = served.model
        request, config = request_form.values(
            served,
            subject,
            model.topk,
            seed,
            model.steps,
            model.guidance_scale,
            64,
            64,
            "softmax",
            "all",
            0.0,
            model.dense_steps,
        )
        with served.lock:
            comparison = compare(served.pipe, request, _variants(config, served.trained(), False))
        left, right = (_shown(result.frames) for result in comparison.results[:2])
        return [
            *([left, right] if served.is_video else [(left, right)]),
            _cards(comparison, served),
            comparison.to_dict(),
        ]

    outputs = [*pictures, cards, numbers, show, results]
    running = run.click(
        on_run, [*form.inputs, both, loaded], outputs, api_name="compare", concurrency_id="model", concurrency_limit=1,
        show_progress="hidden",
    )  # fmt: skip
    stop.click(None, None, None, cancels=[running], api_visibility="private").then(
        lambda: "<p class='hint'>Stopped.</p>", None, cards, api_visibility="private"
    )
    show.input(
        lambda kept, pair: _pair(served, kept, pair) if served.is_video else _pair(served, kept, pair)[0],
        [results, show], pictures, api_visibility="private",
    )  # fmt: skip
    subject, _, seed = form.inputs[:3]
    gr.Examples(
        [[text, i] for i, text in enumerate(served.model.subjects)], [subject, seed], [*pictures, cards, numbers],
        on_example, cache_examples=True, cache_mode="lazy", label="Ready-made: computed for the first who asks",
        api_visibility="private",
    )  # fmt: skip


def _variants(config, trained, with_untrained) -> list[Variant]:
    variants = []
    if trained:
        config = request_form.trained_settings(config, trained)  # of both: they differ in their training alone
        variants.append(Variant(name=TRAINED, config=config, state=trained, lora=lora_beside(trained)))
    if with_untrained or not trained:
        variants.append(Variant(name=UNTRAINED, config=config))
    return variants


def _shown(frames) -> Any:
    """An image, or the path of a video: H.264 in 4:2:0, which every browser plays. Old ones are deleted."""
    if len(frames) == 1:
        return frames[0]
    for path in VIDEOS.glob("*.mp4"):
        with contextlib.suppress(FileNotFoundError):  # another did it
            if path.stat().st_mtime < time.time() - 2 * KEPT_SECONDS:
                path.unlink()
    return str(save_frames(frames, VIDEOS / f"{uuid.uuid4().hex}.mp4"))


def _pair(served, kept, pair):
    left, right = pair.split(" | ")
    if served.is_video:
        return [gr.Video(kept[left], label=left), gr.Video(kept[right], label=right)]
    return [gr.ImageSlider((kept[left], kept[right]), label=f"Left: {left}. Right: {right}. Drag the line.")]


def _waiting(served) -> str:
    return (
        f"<p class='hint'>Press <b>Compare</b>: the same seed runs through {html.escape(served.model.title)}, "
        "first with its own attention, then with SLA.</p>"
    )


def _cards(comparison: Comparison, served: Served) -> str:
    """The headline and the table, as HTML."""
    dense, first = comparison.results[:2]
    faster = dense.attention_seconds / first.attention_seconds
    saved = 1 - first.attention_flops / dense.attention_flops
    cards = [
        (f"{faster:.1f}x", "faster attention"),
        (f"{dense.seconds / first.seconds:.1f}x", "faster end to end"),
        (f"{saved:.0%}", "of attention's arithmetic saved"),
        (f"{first.exact_share:.0%}", "of the blocks computed exactly"),
    ]
    rows = comparison.rows()
    head = "".join(f"<th scope='col'>{html.escape(name) or 'attention'}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows
    )
    tiles = "".join(f"<div class='card'><b>{value}</b><span>{label}</span></div>" for value, label in cards)
    where = f"{comparison.steps} steps, {comparison.dtype} on {comparison.device}, torch {comparison.torch_version}"
    what = "video" if served.is_video else "image"
    warm = "Nothing was run to warm up." if served.on_cpu else "One step of each ran before it was timed."
    return (
        f"<div class='cards'>{tiles}</div><div class='scroll'><table class='numbers'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><p class='hint'>{html.escape(where)}. {warm} PSNR and SSIM are against "
        f"dense with the same seed: another {what} is not a worse one, look at both.</p>"
    )
