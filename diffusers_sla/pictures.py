"""Pictures of a comparison and of block maps, as PIL images."""

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from .compare import Comparison, Result
from .inside import LayerView

# Value in a block map -> colour and name, told apart in greyscale too.
BLOCK_COLOURS = {1: ((23, 55, 120), "critical: exact"), 0: ((176, 203, 235), "marginal: linear branch"), -1: ((245, 240, 230), "negligible: left out")}  # fmt: skip  # noqa: E501


def block_map_image(block_map: np.ndarray, size: int = 512) -> Image.Image:
    """[num_q_blocks, num_k_blocks] int8 as a picture about `size` pixels wide: a row per query block."""
    colours = np.zeros((*block_map.shape, 3), np.uint8)
    for value, (colour, _) in BLOCK_COLOURS.items():
        colours[block_map == value] = colour
    factor = max(1, size // block_map.shape[1])
    return Image.fromarray(colours).resize(
        (block_map.shape[1] * factor, block_map.shape[0] * factor), Image.Resampling.NEAREST
    )


def where_a_block_looks(view: LayerView, frames: Sequence[Image.Image], head: int, q_block: int) -> list[Image.Image]:
    """The frames with the keys that a query block attends to exactly left bright, and its own queries framed in red.

    Raises:
        ValueError: The layer's tokens do not lie on a grid over the frames, or there is no such head or block.
    """
    H, num_q_blocks, _ = view.block_map.shape
    for name, value, limit in (("head", head, H), ("q_block", q_block, num_q_blocks)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be from 0 to {limit - 1}, got {value}")
    grid = view.grid(frames)
    num_tokens = view.num_tokens - sum(view.kept)
    token = np.arange(num_tokens)
    bright = (view.block_map[head, q_block][token // view.config.blkk] == 1).reshape(grid)
    own = (token // view.config.blkq == q_block).reshape(grid)
    pictures = []
    for i, frame in enumerate(frames):
        t = i * grid[0] // len(frames)
        keys, queries = (
            np.asarray(Image.fromarray((part[t] * 255).astype(np.uint8)).resize(frame.size, Image.Resampling.NEAREST))
            for part in (bright, own)
        )
        pixels = np.asarray(frame.convert("RGB")).astype(np.float32)
        dimmed = pixels * 0.25 + 20
        pixels = np.where(keys[..., None] > 0, pixels, dimmed)
        pixels = np.where(queries[..., None] > 0, 0.35 * pixels + 0.65 * np.array([225, 60, 45]), pixels)
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return pictures


def branch_images(
    view: LayerView, frames: Sequence[Image.Image], head: int, frame: int | None = None
) -> tuple[Image.Image, Image.Image]:
    """Length of what the sparse and the linear branch add to each token of a frame, on one scale of colours.

    Args:
        frame: Index in `frames`; the middle one when None.

    Raises:
        ValueError: See `LayerView.grid`.
    """
    grid = view.grid(frames)
    t = grid[0] // 2 if frame is None else frame * grid[0] // len(frames)
    inner = slice(view.kept[0], view.num_tokens - view.kept[1])
    norms = [norm[head, inner].reshape(grid)[t] for norm in (view.sparse_norm, view.linear_norm)]
    top = max(float(norm.max()) for norm in norms) or 1.0
    colours = [(colormaps["cividis"](norm / top)[..., :3] * 255).astype(np.uint8) for norm in norms]
    sparse, linear = (Image.fromarray(c).resize(frames[0].size, Image.Resampling.NEAREST) for c in colours)
    return sparse, linear


def comparison_picture(
    comparison: Comparison, views: Sequence[tuple[LayerView, int]] = (), title: str = ""
) -> Image.Image:
    """Images side by side and, under them, block maps: a (layer, head) each."""
    count = len(comparison.results)
    width = 3.2 * max(count, 3)
    names = [wrapped(f"{_short(view.layer)}, head {head}", int(14 * width / len(views))) for view, head in views]
    heights = [4.2, 2.1 + 0.12 * max(name.count("\n") + 1 for name in names)] if views else [4.2]
    figure = Figure(figsize=(width, sum(heights)), dpi=120, layout="constrained")
    top, *rest = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if title:
        figure.suptitle(title, fontsize=11)
    for axes, result in zip(np.atleast_1d(top.subplots(1, count)), comparison.results, strict=True):
        axes.imshow(result.frames[0])
        axes.set_title(_caption(result, comparison.dense), fontsize=9)
        axes.set_axis_off()
    if views:
        panels = np.atleast_1d(rest[0].subplots(1, len(views)))
        for axes, (view, head), name in zip(panels, views, names, strict=True):
            axes.imshow(block_map_image(view.block_map[head]))
            axes.set_title(name, fontsize=7)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0].set_ylabel("query blocks", fontsize=7)
        panels[0].set_xlabel("key blocks", fontsize=7)
        present = {int(value) for view, head in views for value in np.unique(view.block_map[head])}
        patches = [_patch(*BLOCK_COLOURS[value]) for value in BLOCK_COLOURS if value in present]
        rest[0].legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return render(figure)


def wrapped(name: str, width: int) -> str:
    """The name of a layer in lines of at most `width` characters, each part together with its number."""
    lines = [""]
    for part in re.findall(r"[^.,]+(?:\.\d+)*[.,]? ?", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def render(figure: Figure) -> Image.Image:
    """A matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _caption(result: Result, dense: Result) -> str:
    lines = [result.name, f"{result.seconds:.1f} s, {result.attention_seconds:.1f} s of it in attention"]
    if result is not dense:
        faster = dense.attention_seconds / result.attention_seconds
        near = "identical" if result.psnr == float("inf") else f"PSNR {result.psnr:.1f} dB, SSIM {result.ssim:.3f}"
        lines += [f"attention {faster:.1f}x faster, {result.exact_share:.0%} of blocks exact", near]
    else:
        lines += ["every block exact", ""]
    return "\n".join(lines)


def _short(layer: str) -> str:
    return layer.partition(".")[2].replace("transformer_blocks.", "block ").replace("blocks.", "block ")


def _patch(colour, label):
    return Patch(facecolor=tuple(c / 255 for c in colour), edgecolor="0.5", label=label)
