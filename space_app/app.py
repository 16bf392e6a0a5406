"""The Space: see what Sparse-Linear Attention does. `make space`, or `python space_app/app.py`."""

import html
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import compare_tab
import gradio as gr
import inside_tab
import load_tab
import serving
import speed_tab

from diffusers_sla.compare import device_name
from diffusers_sla.errors import SLAError

CSS = """
.cards { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0; }
.card { flex: 1 1 120px; padding: 10px 12px; border: 1px solid var(--border-color-primary); border-radius: 8px;
        background: var(--background-fill-secondary); }
.card b { display: block; font-size: 1.5rem; color: var(--body-text-color); }
.card span, .hint { color: var(--body-text-color); opacity: 0.85; font-size: 0.9rem; }
progress { width: 100%; accent-color: var(--color-accent); }
.scroll { overflow-x: auto; }
table.numbers { border-collapse: collapse; border: 0 !important; width: 100%;
                font-variant-numeric: tabular-nums; font-size: 0.9rem; }
table.numbers th, table.numbers td { padding: 4px 8px; text-align: right; border: 0;
        border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color); }
table.numbers th { font-weight: 600; }
table.numbers tr { border: 0 !important; }
table.numbers td { white-space: nowrap; }
table.numbers tr > :first-child { text-align: left; white-space: nowrap; }
table.bars td.bar { width: 60%; } table.bars td.bar div { height: 0.8em; background: var(--color-accent); }
table.numbers caption { text-align: left; padding: 4px 8px; color: var(--body-text-color); opacity: 0.85; }
.key { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 4px -1px 10px;
       border: 1px solid var(--border-color-primary); }
.key.critical { background: rgb(23, 55, 120); } .key.marginal { background: rgb(176, 203, 235); }
.key.negligible { background: rgb(245, 240, 230); }
.banner { padding: 8px 12px; border-left: 4px solid var(--color-accent); background: var(--background-fill-secondary);
          border-radius: 4px; color: var(--body-text-color); }
.bad { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.good { color: var(--body-text-color); font-weight: 600; }
"""

INTRODUCTION = """
# Sparse-Linear Attention

Attention compares every token with every other. **SLA** ([paper](https://arxiv.org/abs/2509.24006)) scores pairs of
token *blocks* by their means, computes the best ones **exactly** and covers the rest by **linear attention** through a
small projection that training fills. Most of the arithmetic goes; compare below what it does to the picture.
"""


def banner(served: serving.Served) -> str:
    """Where this runs and what it shows, with a warning that CPU times are not the point."""
    where = f"Runs {html.escape(served.model.title)}, on {html.escape(device_name(served.pipe.device))}."
    if served.on_cpu:
        where += " <b>Times on a CPU are not the point:</b> the kernels are made for GPUs, see the tab Speed."
    return f"<p class='banner'>{where}</p>"


def build(served: serving.Served) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Sparse-Linear Attention", delete_cache=(600, 3600), analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        gr.HTML(banner(served), padding=False)
        loaded = gr.State(None)
        with gr.Tab("Compare"):
            compare_tab.build(served, loaded)
        with gr.Tab("Inside"):
            inside_tab.build(served, loaded)
        with gr.Tab("Load"):
            load_tab.build(served, loaded)
        with gr.Tab("Speed"):
            speed_tab.build(served)
        if served.is_video:
            page.load(None, None, None, js=compare_tab.IN_STEP)
    page.queue(max_size=20, default_concurrency_limit=4)
    return page


def page() -> gr.Blocks:
    """The page, or one that says why there is none."""
    try:
        return build(serving.load())
    except (OSError, SLAError) as error:
        serving.logger.exception("the model could not be loaded")
        with gr.Blocks(title="Sparse-Linear Attention", analytics_enabled=False) as page:
            gr.Markdown(INTRODUCTION)
            message = html.escape(serving.public(str(error)))
            gr.HTML(f"<p class='banner bad'>The model of this Space could not be loaded: {message}</p>", padding=False)
        return page


def main(**launch: Any) -> None:
    """Serve the page. `launch`: more arguments of gr.Blocks.launch."""
    os.environ.setdefault("GRADIO_RESET_EXAMPLES_CACHE", "True")  # examples of another model, version or machine
    page().launch(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        show_error=False,
        ssr_mode=False,
        **launch,
    )


if __name__ == "__main__":
    main()
