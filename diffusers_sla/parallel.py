"""Context parallelism the Ulysses way: each rank gets the whole sequence for its share of the heads, and SLA runs as
on one device."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor


@dataclass
class Ulysses:
    """The exchange of one attention call.

    group: the ranks. degree: how many. text: text tokens at one end ("first" or "last", or None) of each rank's part
    of the sequence: joint models join each rank's text and image, so that the parts in a row are no sequence.
    """

    group: Any
    degree: int

    def whole(self, x: Tensor, text: int, side: str | None) -> Tensor:
        """[B, H, L / degree, D] of this rank -> [B, H / degree, L, D], text and image each in their order."""
        x = SeqAllToAllDim.apply(self.group, x.transpose(1, 2).contiguous(), 2, 1)
        return self._sorted(x, text, side).transpose(1, 2)

    def part(self, x: Tensor, text: int, side: str | None) -> Tensor:
        """The inverse of `whole`."""
        x = self._unsorted(x.transpose(1, 2), text, side).contiguous()
        return SeqAllToAllDim.apply(self.group, x, 1, 2).transpose(1, 2)

    def mask(self, key_mask: Tensor, text: int, side: str | None) -> Tensor:
        """[B, L / degree] of this rank -> [B, L]."""
        parts = [torch.empty_like(key_mask, dtype=torch.uint8) for _ in range(self.degree)]
        dist.all_gather(parts, key_mask.to(torch.uint8).contiguous(), group=self.group)
        return self._sorted(torch.cat(parts, 1), text, side).bool()

    def _sorted(self, x, text, side):
        if not text:
            return x
        ranks = x.unflatten(1, (self.degree, -1))
        cut = text if side == "first" else ranks.shape[2] - text
        return torch.cat([ranks[:, :, :cut].flatten(1, 2), ranks[:, :, cut:].flatten(1, 2)], 1)

    def _unsorted(self, x, text, side):
        if not text:
            return x
        length = x.shape[1] // self.degree
        cut = text if side == "first" else length - text
        front, back = x.split([cut * self.degree, (length - cut) * self.degree], 1)
        return torch.cat([y.unflatten(1, (self.degree, -1)) for y in (front, back)], 2).flatten(1, 2)


def ulysses(parallel_config: Any, heads: int, key_heads: int) -> tuple[Ulysses | None, str | None]:
    """The exchange that a processor's `_parallel_config` asks for, if any, or the reason why SLA cannot take part."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return None, None
    if config.ring_degree > 1:
        return None, (
            "ring attention passes keys around in parts, and the best blocks of a query can only be chosen with all "
            "of them at hand; use ulysses_degree"
        )
    if config.ulysses_anything:
        return None, "ulysses_anything gives the ranks parts of different lengths; use plain Ulysses"
    if heads % config.ulysses_degree or key_heads % config.ulysses_degree:
        return None, f"{heads} heads over {key_heads} do not divide among {config.ulysses_degree} ranks"
    return Ulysses(config._ulysses_mesh.get_group(), config.ulysses_degree), None
