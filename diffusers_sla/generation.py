"""Running any diffusers pipeline from one request: what `generate`, `demo` and the Space have in common."""

import contextlib
import functools
import importlib.util
import inspect
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .errors import SLAConfigError, SLAUnsupportedError

OnStep = Callable[[int, int], None]
VIDEO_SUFFIXES = (".mp4", ".gif", ".webp")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. None leaves a value to the pipeline.

    Args:
        prompt: For pipelines that take text.
        class_label: Name or number of a class, for pipelines that take one.
        seed: Noise is drawn on the CPU, so a seed means the same on every device.
        steps: Denoising steps.
        guidance_scale: Strength of classifier-free guidance; 1 turns it off.
        height, width: Pixels. num_frames: Frames of a video.

    Raises:
        SLAConfigError: A value is out of range; names it and what is allowed.
    """

    prompt: str | None = None
    class_label: str | int | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    def __post_init__(self):
        for name, lowest, highest in (
            ("seed", 0, 2**63 - 1), ("steps", 1, 1000), ("height", 8, 8192), ("width", 8, 8192),
            ("num_frames", 1, 10_000),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise SLAConfigError(f"{name} must be a whole number from {lowest} to {highest}, got {value!r}")
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and 0 <= scale <= 100):
            raise SLAConfigError(f"guidance_scale must be a number from 0 to 100, got {scale!r}")

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """The keywords to call `pipe` with, but for the generator.

        Raises:
            SLAConfigError: The pipeline takes no such argument, or lacks one; says what it takes.
        """
        accepted = inspect.signature(type(pipe).__call__).parameters
        arguments: dict[str, Any] = {
            "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.height,
            "width": self.width, "num_frames": self.num_frames,
        }  # fmt: skip
        arguments = {name: value for name, value in arguments.items() if value is not None}
        takes_label = "class_labels" in accepted
        if takes_label:
            arguments["class_labels"] = [class_number(pipe, self.class_label)]
        elif self.class_label is not None:
            raise SLAConfigError(f"{type(pipe).__name__} takes a prompt, not a class label")
        if self.prompt is not None:
            arguments["prompt"] = self.prompt
        elif not takes_label and "prompt" in accepted:
            raise SLAConfigError(f"{type(pipe).__name__} needs a prompt")
        for name in arguments:
            if name not in accepted:
                hint = f"; its classes are {', '.join(pipe.labels)}" if takes_label and name == "prompt" else ""
                raise SLAConfigError(f"{type(pipe).__name__} takes no {name.replace('_', ' ')}{hint}")
        return arguments

    def makes_video(self, pipe: Any) -> bool:
        """Whether several frames come of it."""
        parameters = inspect.signature(type(pipe).__call__).parameters
        # What some call it otherwise: Latte, SANA-Video.
        counts = [parameters[name].default for name in ("num_frames", "video_length", "frames") if name in parameters]
        return bool(counts) and (self.num_frames or counts[0]) != 1

    def num_steps(self, pipe: Any) -> int:
        """`steps`, or what the pipeline takes by itself."""
        default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
        return self.steps or (default.default if default is not None else 1)


def class_number(pipe: Any, label: str | int | None) -> int:
    """The number of a class given by name or number.

    Raises:
        SLAConfigError: The pipeline has no such class; names those it has.
    """
    labels: dict[str, int] = getattr(pipe, "labels", {})
    known = f"{type(pipe).__name__} has the classes {', '.join(labels) or 'by number only'}"
    if label is None:
        raise SLAConfigError(f"a class label is needed (--class-label); {known}")
    if label in labels:
        return labels[str(label)]
    number = int(label) if str(label).isdecimal() else None
    if number is None or (labels and number not in labels.values()):
        raise SLAConfigError(f"there is no class {str(label)[:80]!r}; {known}")
    return number


def default_device() -> str:
    """The device that pipelines run on where none is named: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device before any work is done on it.

    Raises:
        SLAUnsupportedError: There is none of that name, or it cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise SLAUnsupportedError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def load_pipeline(model: str | os.PathLike, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """`DiffusionPipeline.from_pretrained` on a device.

    Args:
        model: A folder or the id of a Hub repository.
        device: Where to; `default_device()` when None.
        dtype: float32 on CPU and bfloat16 elsewhere when None.

    Raises:
        OSError: There is no such repository.
        SLAUnsupportedError: The device cannot be used, or the model is no pipeline, or no folder that is there.
    """
    device = device or default_device()
    check_device(device)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(model)) and not os.path.isdir(model):  # cannot be a repository
        raise SLAUnsupportedError(f"{str(model)!r} cannot be loaded as a pipeline: there is no such folder")
    if dtype is None:
        dtype = torch.float32 if device.startswith("cpu") else torch.bfloat16
    try:
        return DiffusionPipeline.from_pretrained(str(model), dtype=dtype).to(device)
    except ValueError as error:
        raise SLAUnsupportedError(f"{str(model)!r} cannot be loaded as a pipeline: {error}") from error


@dataclass
class Generation:
    """frames: one image, or the frames of a video. seconds: the whole call, text encoder and decoder included."""

    frames: list[Image.Image]
    seconds: float


def generate(pipe: Any, request: Request, *, on_step: OnStep | None = None) -> Generation:
    """One image or video.

    Args:
        on_step: Called with (steps done, steps in all) after each step. What it raises ends the generation.

    Raises:
        SLAConfigError: The request does not suit the pipeline.
    """
    arguments = request.arguments(pipe)
    device = torch.device(getattr(pipe, "_execution_device", pipe.device))
    total = request.num_steps(pipe)
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments["output_type"] = "pil"  # some give arrays of their own
    with stepping(pipe, lambda step: on_step(step, total) if on_step else None):
        _wait(device)
        start = time.perf_counter()
        output = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(request.seed))
        _wait(device)
        seconds = time.perf_counter() - start
    frames = output.frames[0] if hasattr(output, "frames") else [output.images[0]]
    return Generation(list(frames), seconds)


@contextlib.contextmanager
def stepping(pipe: Any, on_step: Callable[[int], None]) -> Iterator[None]:
    """Call `on_step(steps done)` after each of the scheduler's steps, inside the block."""
    own = vars(pipe.scheduler).get("step")  # where blocks nest
    step = pipe.scheduler.step
    done = 0

    @functools.wraps(step)
    def counted(*args, **kwargs):
        nonlocal done
        output = step(*args, **kwargs)
        done += 1
        on_step(done)
        return output

    pipe.scheduler.step = counted  # on this object alone: not every pipeline has callback_on_step_end
    try:
        yield
    finally:
        if own is None:
            del pipe.scheduler.step
        else:
            pipe.scheduler.step = own


def check_suffix(path: Path, suffixes: tuple[str, ...], what: str) -> None:
    """Refuse a file name before any work is done for it.

    Raises:
        SLAConfigError: The suffix is none of `suffixes`.
    """
    if path.suffix.lower() not in suffixes:
        raise SLAConfigError(f"{what} is written as {', '.join(suffixes)}, got {path.name!r}")


def check_output(path: Path, video: bool) -> None:
    """Refuse a file that an image, or a video, cannot be written into.

    Raises:
        SLAConfigError: Its suffix does not suit.
        SLAUnsupportedError: What writes .mp4 is not installed.
    """
    if not video:
        check_suffix(path, IMAGE_SUFFIXES, "an image")
        return
    check_suffix(path, VIDEO_SUFFIXES, "a video")
    needed = ("imageio", "imageio_ffmpeg") if path.suffix.lower() == ".mp4" else ()
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise SLAUnsupportedError("writing .mp4 needs imageio and imageio-ffmpeg; .gif and .webp need nothing more")


def save_frames(frames: list[Image.Image], path: str | os.PathLike, fps: int = 16) -> Path:
    """Write an image, or a video as .mp4, .gif or .webp, making the folder where there is none.

    An .mp4 is H.264 in 4:2:0, which every browser plays, fine enough to compare: about 3 MB for 81 noisy frames of
    832x480.

    Raises:
        SLAConfigError, SLAUnsupportedError: See `check_output`.
    """
    path = Path(path)
    check_output(path, len(frames) > 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(frames) == 1:
        frames[0].save(path)
    elif path.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(frames, str(path), fps=fps, quality=7)  # 5, the default, smooths grain away
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
