"""Tile shapes, warps and pipeline stages: what changes only the speed. Never saved in a state file.

The numbers for Hopper in half precision are measured (benchmarks/tuning.md); elsewhere the same shapes shrink until
they fit the shared memory of the GPU. `diffusers-sla tune` measures on the GPU it runs on and writes a table, which
goes first.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass
from typing import Optional

import torch


def cdiv(a, b):
    return -(-a // b)


def block_d(D):
    """Head size padded to a power of two, at least 16, as the tiles need it."""
    return max(16, 1 << (D - 1).bit_length())


def chunk_size(count, programs, heads):
    """How many of a head's `count` blocks one program takes, so that all heads make about `programs` programs."""
    return cdiv(count, max(1, min(count, programs // heads)))


# How float32 matrices are multiplied: three tensor-core products that keep float32's accuracy where there are such.
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def rounded_precision(dtype):
    """Precision of a product of float32 matrices that come from, or go to, numbers in `dtype`."""
    return PRECISION if dtype == torch.float32 or torch.version.hip else "tf32"


# Shared memory of one program in bytes, by compute capability; what is not listed gets the smallest.
SHARED = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
SMALL_SHARED = 101376
ROCM_SHARED = 65536
REST = 2048  # for what is not a tile of q, k, v or dO


@dataclass(frozen=True)
class Launch:
    """num_warps, num_stages: as in Triton; registers: at most so many a thread, None as the compiler likes. block_m,
    block_n: rows and columns of a tile of scores. block_r, block_c: tile of a [D, D] matrix. rows: rows per program or
    step. programs: about how many programs share the work. fusion: whether a product and a sum may round once."""

    num_warps: int = 4
    num_stages: int = 2
    block_m: int = 64
    block_n: int = 64
    block_r: int = 64
    block_c: int = 64
    rows: int = 64
    programs: int = 264
    registers: Optional[int] = None
    fusion: bool = True

    @property
    def options(self):
        """What Triton takes."""
        limit = {} if self.registers is None or torch.version.hip else {"maxnreg": self.registers}
        fusion = {} if self.fusion else {"enable_fp_fusion": False}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit | fusion


@functools.lru_cache(maxsize=None)
def shared_memory(device):
    """Bytes of shared memory a program may use for tiles. The interpreter has as much as the largest GPU."""
    if device.type != "cuda":
        return max(SHARED.values())
    if torch.version.hip:
        return ROCM_SHARED
    return SHARED.get(torch.cuda.get_device_capability(device), SMALL_SHARED)


@functools.lru_cache(maxsize=None)
def has_gluon(device):
    """Whether the kernels in Gluon run there: a Hopper GPU, and a Triton that they were compiled with."""
    if device.type != "cuda" or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and knows_gluon()


def knows_gluon():
    """Whether this Triton has Gluon as the kernels are written in it: the dialect still changes."""
    import triton

    return (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10)


def takes_gluon(q):
    """Whether usual calls of this head size and dtype go to the kernels in Gluon (hopper*.py), which have one tile
    each."""
    return q.element_size() == 2 and q.shape[-1] in (64, 128) and has_gluon(q.device)


def table_path():
    """Where the table of tuned tiles is: $DIFFUSERS_SLA_TUNED, else beside the Hub's cache."""
    home = os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface"))
    path = os.environ.get("DIFFUSERS_SLA_TUNED", os.path.join(home, "diffusers_sla", "tuned.json"))
    return os.path.expanduser(path)


def gpu_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=None)
def table(device):
    """Tuned launches of this GPU by `table_key`: read once, changed in place by tuning.

    Raises:
        ValueError: The file is no such table.
    """
    try:
        with open(table_path()) as file:
            entries = json.load(file).get(gpu_name(device), {})
            return {key: Launch(**entry) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{table_path()} is no table of tiles ({error}): delete it, or write it anew with `diffusers-sla tune`"
        ) from error


def save_table(device):
    """Write this GPU's table; those of other GPUs in the file stay. The file is replaced as a whole."""
    path = table_path()
    tables = {}
    if os.path.exists(path):
        with open(path) as file:
            tables = json.load(file)
    tables[gpu_name(device)] = {key: asdict(entry) for key, entry in sorted(table(device).items())}
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w") as file:
        json.dump(tables, file, indent=1)
    os.replace(path + ".part", path)


def table_key(config, x, *sizes):
    """What an entry is for: "forward 128x2 64x64" are the forward's tiles at head size 128, 2 bytes, such blocks."""
    return " ".join([config.__name__.removesuffix("_config"), f"{block_d(x.shape[-1])}x{x.element_size()}", "x".join(map(str, sizes))]).strip()  # fmt: skip  # noqa: E501


def tunable(config):
    """Looks into the table first."""

    @functools.wraps(config)
    def chosen(x, *sizes):
        tuned = table(x.device)
        return (tuned.get(table_key(config, x, *sizes)) if tuned else None) or config(x, *sizes)

    return chosen


def _stages(shared, fixed, per_stage, most):
    return max(1, min(most, (shared - REST - fixed) // per_stage))


def _row_bytes(x):
    return block_d(x.shape[-1]) * x.element_size()


def _block_r(x):
    """A whole [D, D] matrix where a tile of it in x's dtype takes no more than 32 KB."""
    BLOCK_D = block_d(x.shape[-1])
    return BLOCK_D if BLOCK_D * _row_bytes(x) <= 32768 else max(32, 16384 // _row_bytes(x))


def _all_registers(x):
    """Products of float32 take more registers than there are: ptxas gives up then, at 32 a thread, unless told so."""
    return 255 if x.element_size() == 4 else None


def _fusion(x):
    """Where a thread holds one number of a row, each lane fuses its own product into the sum over the row: their last
    bits differ, and which one counts is a race (triton-lang/triton#7264)."""
    return block_d(x.shape[-1]) > 32


def _registers(x):
    """With tiles of 64 rows of 128 bytes a limit lets four programs share a multiprocessor, where it multiplies from
    shared memory."""
    if x.element_size() == 4:
        return _all_registers(x)
    return 128 if _row_bytes(x) <= 128 and shared_memory(x.device) > 2 * SMALL_SHARED else None


def sparse_precision(x):
    """Precision of products of float32 matrices in the sparse branch: where there is little shared memory, the copies
    that tensor cores take of the widest rows do not fit."""
    return "ieee" if _row_bytes(x) > 512 and shared_memory(x.device) <= SMALL_SHARED else PRECISION


@tunable
def prepare_config(q, blkk, halves):
    """halves: 2 where phi(k) is of other numbers than k."""
    row, shared = _row_bytes(q), shared_memory(q.device)
    # Sums of phi(K)^T V fill half of the registers: eight warps share them, so that there are two such programs.
    full = row == 256 and q.element_size() == 2
    block_n = min(blkk, 32 if full or row > 512 else 128)
    stages = 1 if row > 256 else _stages(shared, 2 * block_n * row, (1 + halves) * blkk * row, 3)
    return Launch(
        num_warps=8 if full or row > 256 else 4, num_stages=stages, block_n=block_n, block_c=64 if row > 256 else 128,
        rows=max(64, 131072 // row), registers=128 if full else _all_registers(q),
    )  # fmt: skip


def select_config(q_mean):
    narrow = _row_bytes(q_mean) <= 512
    block_c = 128 if narrow and shared_memory(q_mean.device) > 2 * SMALL_SHARED else 64
    return Launch(
        num_warps=8, num_stages=2, rows=16, block_c=block_c, block_n=512, programs=1024,
        registers=128 if narrow else None,
    )  # fmt: skip


def projected_columns(product):
    """Columns of the weight that a program takes at a time: all of it where it fits, so that it is loaded first."""
    roomy = shared_memory(product.device) > 2 * SMALL_SHARED
    whole = product.element_size() == 2 and _row_bytes(product) <= 256 and roomy
    return block_d(product.shape[-1]) if whole else 32


def summed_stages(x):
    """Pipeline stages of the sum over chunks, 16 rows of float32 each, so that two programs fit a multiprocessor."""
    if block_d(x.shape[-1]) > 128:
        return 2
    return 5 if shared_memory(x.device) > 2 * SMALL_SHARED else 3


@tunable
def forward_config(q, blkq, blkk):
    row, shared = _row_bytes(q), shared_memory(q.device)
    block_m = min(blkq, 32 if row > 512 else 64)
    block_n = 64 if row <= 256 else 32
    while block_m * row + 2 * block_n * row > shared - REST and block_n > 16:
        block_n //= 2
    # Where tiles of float32 are multiplied, what the tensor cores read is in shared memory once more.
    copies = 2 if q.element_size() == 4 else 1
    stages = 1 if row > 512 else _stages(shared, copies * block_m * row, 2 * block_n * row, 3)
    return Launch(
        8 if row > 256 else 4,
        stages,
        block_m,
        block_n,
        block_r=_block_r(q),
        registers=_registers(q),
        fusion=_fusion(q),
    )


@tunable
def dq_config(q, blkq, blkk):
    row, shared = _row_bytes(q), shared_memory(q.device)
    block_m = min(blkq, 16 if row > 512 else 32 if row > 256 else 64 if row <= 128 else 128)
    block_n = 64 if row <= 256 else 32
    copies = 2 if q.element_size() == 4 else 1
    while 2 * copies * (block_m + block_n) * row > shared - REST and block_n > 16:
        block_n //= 2
    most = 3 if block_m >= 128 or row <= 128 else 2
    stages = _stages(shared, 2 * copies * block_m * row, 2 * copies * block_n * row, most)
    return Launch(8 if block_m >= 128 or row > 256 else 4, stages, block_m, block_n, registers=_registers(q))


@tunable
def dkdv_config(q, blkq, blkk):
    row, shared = _row_bytes(q), shared_memory(q.device)
    block_n = min(blkk, 128 if row <= 256 else 32)
    block_m = 64 if row <= 256 else 32
    if row > 512 and shared <= SMALL_SHARED:
        block_n = 16
    copies = 2 if q.element_size() == 4 else 1
    while 2 * copies * (block_m + block_n) * row > shared - 4 * REST and block_m > 16:
        block_m //= 2
    stages = _stages(shared, 2 * copies * block_n * row, 2 * copies * block_m * row, 3 if row <= 128 else 2)
    return Launch(8 if block_n >= 128 or row > 256 else 4, stages, block_m, block_n, registers=_all_registers(q))


def _linear_block_r(x, halves, most):
    """Tiles of fewer than 32 columns are multiplied wrongly by Triton 3.6 with 8 warps on Hopper."""
    return max(32, min(_block_r(x), most) // halves)


@tunable
def linear_q_config(q, halves):
    """halves: 2 where phi has two, each with a matrix of its own."""
    row = _row_bytes(q)
    small = halves == 2 or row > 256 or shared_memory(q.device) <= SMALL_SHARED
    pipelined = row > 128 and not small
    return Launch(
        num_warps=8 if small or pipelined else 4, num_stages=1 if small else 3 if pipelined else 2,
        block_r=_linear_block_r(q, halves, 64 if small else 128),
        rows=16 if row > 512 else 32 if pipelined or q.element_size() == 4 else 64,
        registers=_all_registers(q), fusion=_fusion(q),
    )  # fmt: skip


@tunable
def linear_k_config(k, halves):
    row = _row_bytes(k)
    wide = halves == 2 or row > 256
    small = shared_memory(k.device) <= SMALL_SHARED
    return Launch(
        num_warps=8 if wide else 4, num_stages=1 if wide or small else 3, block_r=_linear_block_r(k, halves, 128),
        rows=16 if row > 512 else 64 if wide else 32, programs=528, registers=_all_registers(k),
        fusion=_fusion(k),
    )  # fmt: skip


@tunable
def linear_k_float16_config(dh, halves):
    """As `linear_k_config`, where all is float16 but dH, which is float32."""
    if halves == 1 and _row_bytes(dh) == 512 and shared_memory(dh.device) > 2 * SMALL_SHARED:
        return Launch(num_warps=8, num_stages=1, block_r=128, rows=64, programs=528, registers=255)
    return linear_k_config.__wrapped__(dh, halves)  # not what was tuned for float32
