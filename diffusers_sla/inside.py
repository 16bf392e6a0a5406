"""What SLA does inside one denoising step: which blocks it keeps, how far it is from dense, what each branch adds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .apply import sla_layers, watch_attention
from .config import SLAConfig
from .errors import SLAConfigError, SLAError
from .generation import OnStep, Request, generate
from .kernel import select_blocks, sla_attention


@dataclass
class LayerView:
    """One layer at one step, first sample of the batch.

    block_map: [H, num_q_blocks, num_k_blocks] int8: 1 critical, 0 marginal, -1 negligible; blocks are cut on the
    tokens between the text. kept, kept_keys: text tokens at the front and the back of the queries and of the keys.
    num_tokens: all queries.
    sparse_norm, linear_norm: [H, num_tokens] length of what each branch adds to the output, projections included.
    """

    layer: str
    config: SLAConfig
    block_map: np.ndarray
    kept: tuple[int, int]
    kept_keys: tuple[int, int]
    num_tokens: int
    sparse_norm: np.ndarray
    linear_norm: np.ndarray

    def grid(self, frames: Sequence[Image.Image]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens between the text, over the image or video they make.

        Raises:
            ValueError: They are no such grid.
        """
        width, height = frames[0].size
        num_tokens = self.num_tokens - sum(self.kept)
        grid = token_grid(num_tokens, width, height, len(frames))
        if grid is None:
            raise ValueError(f"{num_tokens} tokens are no grid over {len(frames)} frames of {width}x{height}")
        return grid

    def block_at(self, x: int, y: int, frames: Sequence[Image.Image], frame: int = 0) -> int:
        """The query block of a pixel.

        Raises:
            ValueError: See `grid`; or the pixel is outside.
        """
        t, rows, columns = self.grid(frames)
        width, height = frames[0].size
        if not (0 <= x < width and 0 <= y < height and 0 <= frame < len(frames)):
            raise ValueError(f"there is no pixel ({x}, {y}) in frame {frame} of {width}x{height}")
        at = (frame * t // len(frames) * rows + y * rows // height) * columns + x * columns // width
        return at // self.config.blkq


@dataclass
class Inside:
    """frames: what was generated. errors: layer -> ||SLA - dense|| / ||dense|| on the same query, key, value."""

    frames: list[Image.Image]
    step: int
    errors: dict[str, float]
    layers: dict[str, LayerView]


def look_inside(
    pipe: Any, request: Request, *, step: int, layers: Sequence[str] | None = None, on_step: OnStep | None = None
) -> Inside:
    """Generate with the SLA that a pipeline has, and look at one step. The image is the one it makes unwatched.

    Args:
        step: Denoising step to look at, from 1.
        layers: Layers to keep maps of, as `sla_layers` names them; all when None. Errors are of every layer.
        on_step: See `generate`.

    Raises:
        SLAError: SLA is not installed, or no layer ran it in this step.
        SLAConfigError: There is no such step or layer.
    """
    installed = sla_layers(pipe)
    if not installed:
        raise SLAError("there is no SLA on this pipeline; apply_sla(pipe) puts it there")
    total = request.num_steps(pipe)
    if not 1 <= step <= total:
        raise SLAConfigError(f"step must be a whole number from 1 to {total}, got {step!r}")
    for name in layers or ():
        if name not in installed:
            raise SLAConfigError(f"there is no SLA layer {name!r}; there are {', '.join(installed)}")
    inside = Inside([], step, {}, {})
    current = 1

    def watcher(name, processor):
        calls = processor.calls_sla

        def watch(processor, query, key, value, key_mask, kept, run):
            nonlocal calls
            output = run()
            ran_sla, calls = processor.calls_sla > calls, processor.calls_sla
            if current == step and ran_sla and name not in inside.errors:
                _look(inside, name, processor, query, key, value, key_mask, kept, output, layers)
            return output

        return watch

    def count(done, of):
        nonlocal current
        current = done + 1
        if on_step:
            on_step(done, of)

    with watch_attention(pipe, {name: watcher(name, layer) for name, layer in installed.items()}):
        inside.frames = generate(pipe, request, on_step=count).frames
    if not inside.errors:
        raise SLAError(f"no layer ran SLA in step {step}; sla_report(pipe) says why")
    return inside


@torch.no_grad()
def _look(inside, name, processor, query, key, value, key_mask, kept, output, layers):
    q, k, v, o = (x[:1] for x in (query, key, value, output))
    mask = None if key_mask is None else key_mask[:1]
    dense = F.scaled_dot_product_attention(
        q, k, v, None if mask is None else mask[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
    )
    inside.errors[name] = float((o.float() - dense.float()).norm() / dense.float().norm())
    if layers is not None and name not in layers:
        return
    config = processor.config
    kept_keys = processor.kept_keys(query, key, kept)
    keep = dict(key_mask=mask, keep_q=kept, keep_k=kept_keys)
    block_map = select_blocks(q, k, topk=config.topk, blkq=config.blkq, blkk=config.blkk, skip=config.skip, **keep)
    sparse = sla_attention(
        q, k, v, topk=config.topk, blkq=config.blkq, blkk=config.blkk, skip=config.skip, linear="none",
        proj_s_weight=processor.state.proj_s_weight, block_map=block_map, **keep,
    )  # fmt: skip
    both = processor.state(q, k, v, config, block_map=block_map, **keep)  # o rounds like its whole batch
    inside.layers[name] = LayerView(
        name,
        config,
        block_map[0].cpu().numpy(),
        tuple(kept),
        tuple(kept_keys),
        q.shape[2],
        _norm(sparse),
        _norm(both - sparse),
    )


def _norm(x: Tensor) -> np.ndarray:
    return x[0].float().norm(dim=-1).cpu().numpy()


def token_grid(num_tokens: int, width: int, height: int, num_frames: int = 1) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of tokens for an image or video of that size, or None where no grid fits.

    Diffusers orders tokens by frame, then row, then column.
    """
    frames = sorted({1, num_frames, *(1 + (num_frames - 1) // ratio for ratio in (4, 8))}, reverse=True)
    for t in frames if num_frames > 1 else [1]:
        rows = round((num_tokens / t * height / width) ** 0.5)
        if rows and num_tokens == t * rows * (num_tokens // (t * rows)):
            columns = num_tokens // (t * rows)
            if abs(columns / rows - width / height) <= 0.1 * width / height:
                return t, rows, columns
    return None
