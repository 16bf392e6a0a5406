"""A folder of images or videos, or of latents made before, as the `imagefolder` of Hugging Face has it.

    folder/metadata.jsonl   {"file_name": "0001.png", "text": "a red cat"}     or "label": "cat"
    folder/cat/0001.png     without metadata.jsonl: the class is the folder's name

A `.safetensors` file holds latents made before: "latents" [C, H, W] or [C, F, H, W], scaled as the VAE's config says,
and before any packing into tokens.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from safetensors.torch import load_file
from torch import Tensor

from ..errors import SLADataError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
LATENTS = (".safetensors",)
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Example:
    """A file and what it shows: a caption, or the name or number of a class."""

    path: Path
    condition: str | int


def scan_folder(folder: str | os.PathLike, caption_column: str = "text") -> list[Example]:
    """The examples of a folder, in the order of their names; opens nothing but metadata.jsonl.

    Raises:
        SLADataError: There is no such folder, no example in it, or metadata.jsonl is wrong; names the line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SLADataError(f"there is no folder {folder}")
    known = IMAGES + VIDEOS + LATENTS
    if (folder / METADATA).is_file():
        examples = _read_metadata(folder, caption_column)
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in known)
        examples = [Example(path, path.parent.name) for path in files if path.parent != folder]
        if files and not examples:
            raise SLADataError(
                f"{folder} has {len(files)} files but neither a {METADATA} with their captions nor a folder per class"
            )
    if not examples:
        raise SLADataError(f"{folder} has no file to train on; known are {', '.join(known)}")
    return examples


def _read_metadata(folder: Path, caption_column: str) -> list[Example]:
    examples = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{folder / METADATA}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise SLADataError(f"{where} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise SLADataError(f'{where} has no "file_name"')
        condition = entry.get(caption_column, entry.get("label"))
        if isinstance(condition, bool) or not isinstance(condition, str | int):
            raise SLADataError(f'{where} has neither a caption under "{caption_column}" nor a "label"')
        path = folder / entry["file_name"]
        if not path.is_file():
            raise SLADataError(f"{where}: there is no file {path}")
        examples.append(Example(path, condition))
    return examples


def load_pixels(path: Path, height: int, width: int, num_frames: int | None) -> Tensor:
    """An image [3, H, W], or the first frames of a video [3, F, H, W], filled to size from its middle, in [-1, 1].

    Raises:
        OSError, ValueError: It cannot be read, or is too short.
    """
    if num_frames is None or path.suffix.lower() in IMAGES:
        with Image.open(path) as image:
            frames = [ImageOps.exif_transpose(image).convert("RGB")]
    elif path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            frames = [
                frame.convert("RGB")
                for _, frame in zip(range(num_frames), ImageSequence.Iterator(image), strict=False)
            ]
    else:
        from diffusers.utils import load_video

        frames = list(load_video(str(path))[:num_frames])  # type: ignore[arg-type]
    if len(frames) < (num_frames or 1):
        raise ValueError(f"it has {len(frames)} frames, {num_frames} are needed")
    fitted = [np.asarray(ImageOps.fit(frame, (width, height), Image.Resampling.LANCZOS)) for frame in frames]
    pixels = torch.from_numpy(np.stack(fitted)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)
    return pixels if num_frames is not None else pixels[:, 0]


@dataclass
class Skipped:
    """A file that could not be read, and why."""

    path: Path
    reason: str


def encode_latents(
    examples: Sequence[Example],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    cache: Path,
    *,
    height: int,
    width: int,
    num_frames: int | None,
    key: str,
    on_example: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[Example, Path]], list[Skipped]]:
    """Encode every example once, into one file each below `cache`; files that are there already are kept.

    Args:
        encode: Pixels with a batch dimension -> mean and standard deviation of the scaled latents.
        key: What the latents depend on besides the file and the size: the model.

    Returns the examples that could be read, with their files, and those that could not.
    """
    cache.mkdir(parents=True, exist_ok=True)
    encoded, skipped = [], []
    for example in examples:
        path = example.path
        stat = path.stat()
        identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, height, width, num_frames, key)
        target = cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.pt"
        if not target.is_file():
            try:
                latents = _latents_of(path, encode, height, width, num_frames)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                reason = (str(error).splitlines() or [""])[0] or type(error).__name__
                skipped.append(Skipped(path, reason))
                on_example()
                continue
            save_whole(latents, target)
        encoded.append((example, target))
        on_example()
    return encoded, skipped


def _latents_of(path, encode, height, width, num_frames) -> dict[str, Tensor]:
    if path.suffix.lower() in LATENTS:
        tensors = load_file(path)
        if "latents" not in tensors:
            raise ValueError(f"it has no tensor 'latents', but {', '.join(tensors) or 'none'}")
        return {"mean": tensors["latents"].float()}
    mean, deviation = encode(load_pixels(path, height, width, num_frames)[None])
    return {"mean": mean[0].cpu(), "std": deviation[0].cpu()}


def save_whole(value: Any, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        torch.save(value, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Order:
    """Which example goes where: each epoch is a permutation drawn from (seed, epoch), whoever asks and whenever.

    A resumed run needs no position to be restored, nor does its number of processes matter to what comes when.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int = 0, processes: int = 1):
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.processes = rank, processes
        self._epoch: tuple[int, list[int]] = (-1, [])

    def indices(self, micro_step: int) -> list[int]:
        """The examples of one process's batch at a micro-step, counted from 0 over the whole run."""
        first = (micro_step * self.processes + self.rank) * self.batch
        return [self._at(position) for position in range(first, first + self.batch)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, 1, epoch))
            self._epoch = (epoch, torch.randperm(self.count, generator=generator).tolist())
        return self._epoch[1][place]


def mix(*numbers: int) -> int:
    """One seed of several, the same on every machine."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
