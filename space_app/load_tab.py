"""Load: trained projections from a repository on the Hub, for this visitor's comparisons."""

import html
from typing import Any

import gradio as gr
from serving import Served, answered

from diffusers_sla import load_sla_weights, remove_sla
from diffusers_sla.errors import SLAConfigError
from diffusers_sla.hub import is_repo_id
from diffusers_sla.inspection import Inspection, inspect_state

NOTHING = "<p class='hint'>Nothing is loaded.</p>"


def build(served: Served, loaded: gr.State) -> None:
    """Lay out the tab. `loaded` receives the repository, once it is known to fit the pipeline."""
    gr.Markdown(
        "Projections that somebody trained, from a repository that holds `sla_attention.safetensors` or "
        "`sla_attention.pt`. They are read as plain tensors; nothing in the file is ever run."
    )
    with gr.Row():
        repository = gr.Textbox(
            label="Repository",
            placeholder="user/repository",
            max_lines=1,
            scale=3,
            info="Public, on the Hugging Face Hub.",
        )
        load = gr.Button("Load", variant="primary", scale=1, min_width=100)
        forget = gr.Button("Forget", scale=1, min_width=100)
    found = gr.HTML(NOTHING, label="What it holds", padding=False)
    details = gr.JSON(label="Its settings and records", visible=False)

    def on_load(name):
        name = checked_repository(name)
        inspection = answered(lambda: inspect_state(name))
        problem = answered(lambda: _problem(served, name)) if inspection.problem is None else inspection.problem
        shown = {"settings": inspection.settings, "recorded": inspection.meta, "sha256": inspection.sha256}
        return _described(name, inspection, problem), gr.JSON(shown, visible=True), None if problem else name

    gr.on(
        [load.click, repository.submit], on_load, repository, [found, details, loaded], api_name="load",
        concurrency_limit=2,
    )  # fmt: skip
    forget.click(
        lambda: (NOTHING, gr.JSON(visible=False), None), None, [found, details, loaded], api_visibility="private"
    )  # fmt: skip


def checked_repository(name: Any) -> str:
    """A repository's id: never a path on this machine, whatever its form.

    Raises:
        gr.Error: It is none.
    """
    name = name.strip() if isinstance(name, str) else ""
    if len(name) > 96 or ".." in name or not is_repo_id(name):
        raise gr.Error("That is no repository: its name reads user/repository.", print_exception=False)
    return name


def _problem(served: Served, name: str) -> str | None:
    """Why the pipeline here cannot use it, or None."""
    with served.lock:
        try:
            load_sla_weights(served.pipe, name)
        except SLAConfigError as error:
            return str(error)
        except ValueError as error:
            return f"it does not suit the pipeline of this Space: {error}"
        finally:
            remove_sla(served.pipe)
    return None


def _described(name: str, inspection: Inspection, problem: str | None) -> str:
    settings = inspection.settings or {}
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    verdict = (
        f"<p class='bad'>Not loaded: {html.escape(problem)}</p>" if problem
        else "<p class='good'>Loaded. Compare and Inside now use it as the trained projections, with its settings.</p>"
    )  # fmt: skip
    return (
        f"{verdict}<div class='scroll'><table class='numbers'><caption>{html.escape(name)}: {len(inspection.tensors)} "
        f"layers</caption><tbody>{rows}</tbody></table></div>"
    )
