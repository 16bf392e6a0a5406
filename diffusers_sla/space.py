"""The demo as a Space on the Hub: the project's app with the package beside it, so that a Space needs no release."""

import os
from pathlib import Path

from .cards import TEMPLATES
from .errors import SLAHubError
from .hub import Pushed, push_files

APP = Path(__file__).parent.parent / "space_app"
RECORDS = APP.parent / "benchmarks"  # the app draws its speed curves from them
_SKIPPED = {"__pycache__", "outputs"}


def space_files(app: str | os.PathLike = APP) -> dict[str, Path]:
    """What a Space consists of, by path in it.

    Raises:
        SLAHubError: `app` is not a Gradio app with README.md and requirements.txt.
    """
    app = Path(app)
    missing = [name for name in ("app.py", "README.md", "requirements.txt") if not (app / name).is_file()]
    if missing:
        raise SLAHubError(
            f"{app} has no {missing[0]}: push-space takes the folder space_app of a checkout of the project"
        )
    package = Path(__file__).parent
    return {
        **_walk(app, ""),
        **_walk(package, "diffusers_sla/"),
        **_walk(TEMPLATES, "diffusers_sla/model_card_templates/"),
        **{f"benchmarks/{path.name}": path for path in sorted(RECORDS.glob("*.json"))},
    }


def push_space(
    repo_id: str,
    *,
    app: str | os.PathLike = APP,
    private: bool | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Put the demo on the Hub as a Gradio Space, in one commit; the same again is no commit.

    Raises:
        SLAHubError: See `space_files` and `push_files`.
    """
    files = space_files(app)
    return push_files(
        repo_id, lambda _: files, message="Update the demo", repo_type="space", space_sdk="gradio", private=private,
        token=token,
    )  # fmt: skip


def _walk(folder: Path, prefix: str) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in _SKIPPED or part.startswith(".") for part in parts):
            found[prefix + "/".join(parts)] = path
    return found
