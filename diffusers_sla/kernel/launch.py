"""Tile shapes, warps and pipeline stages: what changes only the speed. Never saved in a state file."""

import functools
from dataclasses import dataclass

import torch


def block_d(D):
    """Head size padded to a power of two, at least 16, as the tiles need it."""
    return max(16, 1 << (D - 1).bit_length())


# How float32 matrices are multiplied: three tensor-core products that keep float32's accuracy where there are such.
PRECISION = "ieee" if torch.version.hip else "tf32x3"


@dataclass(frozen=True)
class Launch:
    """num_warps, num_stages: as in Triton. block_n: columns per step of the inner loop. block_r, block_c: tile of a
    [D, D] matrix. rows: rows per program. programs: about how many programs share the work."""

    num_warps: int = 4
    num_stages: int = 2
    block_n: int = 64
    block_r: int = 64
    block_c: int = 64
    rows: int = 16
    programs: int = 512


@functools.lru_cache(maxsize=None)
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _is_hopper(x):
    return x.is_cuda and torch.version.hip is None and _capability(x.device.index) == (9, 0)


def _wide(x):
    """Twice as many bytes per row as 128 half-precision numbers: tiles must be halved to fit shared memory."""
    return block_d(x.shape[-1]) * x.element_size() > 256


def prepare_config(q, feature_map):
    BLOCK_D = block_d(q.shape[-1])
    block_c = min(BLOCK_D, 128 if BLOCK_D <= 128 else 64)
    return Launch(num_warps=8 if BLOCK_D >= 128 else 4, num_stages=2, block_c=block_c)


def select_config(q_mean):
    return Launch(num_warps=4, num_stages=1, rows=16, block_n=64 if q_mean.shape[-1] > 128 else 128)


def forward_config(q, blkq, blkk):
    if _wide(q):
        return Launch(num_warps=8 if blkq >= 128 else 4, num_stages=1, block_n=max(32, min(blkk, 64)), block_r=32)
    return Launch(num_warps=8 if blkq >= 128 else 4, num_stages=2, block_n=max(64, blkk), block_r=64)


def dq_config(q, blkq, blkk):
    if _wide(q):
        return Launch(num_warps=8, num_stages=1, block_n=max(32, min(blkk, 64)))
    return Launch(num_warps=8 if blkq >= 128 else 4, num_stages=2, block_n=max(64, blkk))


def dkdv_config(q, blkq, blkk):
    if _wide(q):
        return Launch(num_warps=8, num_stages=1, block_n=max(32, min(blkq, 64)))
    return Launch(num_warps=8 if blkk >= 128 else 4, num_stages=2, block_n=max(64, blkq))


def linear_config(q):
    return Launch(num_warps=8 if _wide(q) else 4, num_stages=1, block_r=32 if _wide(q) else 64)
