"""The pipeline that this Space shows, and how its visitors share it: one at a time, with progress and a way to stop.

`SPACE_MODEL` names one of MODELS, "sample" by default. `SPACE_STATE` names a folder or repository with trained
projections for it; the LoRA beside them in a folder is used too.
"""

import contextlib
import html
import logging
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from diffusers_sla.errors import SLAConfigError, SLAError
from diffusers_sla.generation import default_device, load_pipeline

logger = logging.getLogger("space")
HERE = Path(__file__).parent
MAX_PROMPT = 2000


@dataclass(frozen=True)
class Model:
    """A pipeline and the values its page starts with.

    dense_steps: the first ones of an image, where its layout is decided; what was trained with a LoRA needs none, and
    its LoRA would change them.

    subjects: prompts, or the classes that the pipeline has. step_seconds: of a dense step, for ZeroGPU's estimates;
    reckoned, not measured: 570 TFLOP for Wan and 25 for SDXL, with guidance, at 140 TFLOP/s.
    """

    title: str
    source: str
    subjects: tuple[str, ...]
    steps: int
    guidance_scale: float
    topk: float
    step_seconds: float
    dense_steps: int = 2
    max_steps: int = 50
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    state: str | None = None
    takes_classes: bool = False


MODELS = {
    "sample": Model(
        title="the sample pipeline: 19 million parameters, 256x256 pixels, 4096 tokens",
        source=str(HERE / "sample_pipeline"), subjects=("temple", "flower", "coffee", "coins", "galaxies", "cat"),
        steps=6, guidance_scale=2.0, topk=0.05, step_seconds=0.1, dense_steps=0, max_steps=20,
        state=str(HERE / "sample_state"), takes_classes=True,
    ),
    "wan": Model(
        title="Wan 2.1 1.3B: 81 frames of 832x480, 32760 tokens", source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        subjects=("A red fox trots through fresh snow at dawn.", "Waves roll onto a black beach, seen from above."),
        steps=15, guidance_scale=5.0, topk=0.1, step_seconds=4.0, height=480, width=832, num_frames=81,
    ),
    "sdxl": Model(
        title="SDXL 1.0: 1024x1024 pixels", source="stabilityai/stable-diffusion-xl-base-1.0",
        subjects=("A lighthouse on a cliff, oil painting.", "A macro photograph of a dew-covered spider web."),
        steps=25, guidance_scale=5.0, topk=0.2, step_seconds=0.2, height=1024, width=1024,
    ),
}  # fmt: skip

try:  # only on ZeroGPU, where the GPU belongs to a request for so many seconds
    from spaces import GPU as _zero_gpu
except ImportError:
    _zero_gpu = None


def on_gpu(seconds: Callable[..., int]):
    """Decorates what needs the GPU; `seconds` takes the same arguments and estimates how long."""

    def decorate(function):
        return function if _zero_gpu is None else _zero_gpu(duration=seconds)(function)

    return decorate


class StoppedError(Exception):
    """The visitor went away or pressed Stop."""


@dataclass
class Served:
    """The loaded pipeline. Whoever runs it, or changes its processors, holds `lock`."""

    model: Model
    pipe: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def classes(self) -> list[str]:
        return list(getattr(self.pipe, "labels", {}))

    @property
    def is_video(self) -> bool:
        return self.model.num_frames is not None

    @property
    def on_cpu(self) -> bool:
        return self.pipe.device.type == "cpu"

    def gpu_seconds(self, steps: Any, runs: int) -> int:
        """How long `runs` generations hold the GPU, with loading, warm-up and decoding; what is refused takes none."""
        if not self.allows(steps):
            return 1
        return math.ceil(15 + self.model.step_seconds * (steps + 3) * runs)

    def allows(self, steps: Any) -> bool:
        return isinstance(steps, int | float) and 1 <= steps <= self.model.max_steps

    def fork_only_at_rest(self) -> None:
        """ZeroGPU works in forks of this process: none is to begin while a thread here changes the pipeline."""
        release = self.lock.release
        os.register_at_fork(before=self.lock.acquire, after_in_parent=release, after_in_child=release)

    def trained(self) -> str | None:
        """Where trained projections for this pipeline are, if there are any."""
        source = os.environ.get("SPACE_STATE") or self.model.state
        return source if source and (not os.path.isabs(source) or os.path.isdir(source)) else None


def load() -> Served:
    """The pipeline that the environment asks for.

    Raises:
        SLAConfigError: SPACE_MODEL names none.
        OSError, SLAUnsupportedError: See `load_pipeline`.
    """
    name = os.environ.get("SPACE_MODEL", "sample")
    if name not in MODELS:
        raise SLAConfigError(f"SPACE_MODEL must be one of {', '.join(MODELS)}, got {name!r}")
    forks = _zero_gpu is not None and os.environ.get("SPACES_ZERO_GPU")
    pipe = load_pipeline(MODELS[name].source, "cuda" if forks else default_device())
    pipe.set_progress_bar_config(disable=True)
    served = Served(MODELS[name], pipe)
    if forks:
        served.fork_only_at_rest()
    return served


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done of all, and of what. A run that failed says so last."""

    name: str
    done: int
    total: int
    failed: bool = False

    def __str__(self) -> str:
        if self.failed:
            return "<p class='hint' role='status'>Nothing came of it: see the message.</p>"
        if not self.total:
            return "<p class='hint' role='status'>Waiting for the pipeline…</p>"
        text = f"{html.escape(self.name)}: step {self.done} of {self.total}"
        return f"<p class='hint' role='status'><progress value='{self.done}' max='{self.total}'></progress> {text}</p>"


def streamed(served: Served, work: Callable[[Callable[[str, int, int], None]], Any]) -> Iterator:
    """Run `work(on_progress)` in a thread that owns the pipeline; yields Progress while it runs, then its result.

    Closing the iterator, as Gradio does when a visitor stops or leaves, ends the work after its current step.
    """
    updates: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def on_progress(name, done, total):
        if stop.is_set():
            raise StoppedError
        updates.put(Progress(name, done, total))

    def run():
        with served.lock:
            on_progress("", 0, 0)
            return work(on_progress)

    executor = ThreadPoolExecutor(1)
    future = executor.submit(run)
    last = Progress("", 0, 0)
    try:
        while not future.done():
            with contextlib.suppress(queue.Empty):
                last = updates.get(timeout=0.25)
            yield last
        try:
            result = answered(future.result)
        except gr.Error:
            # Gradio's own `failure` event is of no use here: the page sends it after a cancelled run, too.
            yield replace(last, failed=True)
            raise
        yield result
    finally:
        stop.set()
        executor.shutdown(wait=False)


def answered(call: Callable[[], Any]) -> Any:
    """call(), with what it raises told to the visitor in a sentence: no traceback, no path, no token.

    Raises:
        gr.Error: Whatever was wrong.
    """
    try:
        return call()
    except gr.Error:
        raise
    except torch.OutOfMemoryError as error:
        logger.exception("out of memory")
        raise gr.Error(
            "The GPU's memory is full. Try fewer frames or a smaller size.", print_exception=False
        ) from error
    except (SLAError, ValueError) as error:
        raise gr.Error(public(str(error)), print_exception=False) from error
    except Exception as error:
        logger.exception("a request failed")
        raise gr.Error(
            "Something went wrong here. It has been logged; please try again.", print_exception=False
        ) from error


def public(text: str) -> str:
    """An error message fit for strangers: file names without folders, no tokens, at most 400 characters."""
    text = re.sub(r"hf_\w+", "(token)", text)
    text = re.sub(r"(?<![\w:/.-])(?:/[^\s/'\",;:)]+)+/([^\s/'\",;:)]*)", r"\1", text)
    return text if len(text) <= 400 else text[:399] + "…"


def checked_prompt(text: Any) -> str:
    """A prompt of a sensible length.

    Raises:
        gr.Error: It is empty or too long.
    """
    if not isinstance(text, str) or not text.strip():
        raise gr.Error("Please say what to generate.", print_exception=False)
    if len(text) > MAX_PROMPT:
        raise gr.Error(f"The prompt has {len(text)} characters; {MAX_PROMPT} are the most.", print_exception=False)
    return text.strip()
