"""Tile shapes by measurement: kernel by kernel, the tiles that make its pass fastest.

The entries stand in `kernel/launch.py`'s table, which `save_table` writes. Nothing here prints.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import benchmark
from .config import SLAConfig
from .kernel import launch, sla_attention
from .kernel.launch import Launch

WORTHWHILE = 0.99  # a change must save more than a hundredth: below that it is noise


@dataclass(frozen=True)
class Found:
    """One kernel's result. before, after: milliseconds of the pass it is part of, with the tiles there were and with
    `launch`; tried: how many tile shapes ran."""

    key: str
    what: str
    launch: Launch
    before: float
    after: float
    tried: int


def tune(
    device: str | torch.device, *, D: int, dtype: str = "bfloat16", blkq: int = 64, blkk: int = 64, H: int = 8,
    L: int = 16384, topk: float = 0.1, repeats: int = 20, on_trial: Callable[[str, int, int], None] | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Tune the kernels for one head size, dtype and pair of block sizes; the table keeps what is better.

    Args:
        D, H, L, topk: Head size, heads, tokens and share of key blocks of the calls that are timed, with batch 1.
        on_trial: Called with a kernel's name, the number of the trial and the number of trials.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    config = SLAConfig(topk=topk, blkq=blkq, blkk=blkk)
    q, k, v, do = (torch.randn(1, H, L, D, device=device).to(getattr(torch, dtype)) for _ in range(4))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    weight, bias = torch.randn(D, D, device=device) * 0.1, torch.zeros(D, device=device)

    def forward():
        return sla_attention(
            *inputs, **config.kernel_settings(), proj_l_weight=weight, proj_l_bias=bias, impl="triton"
        )

    def timed(what):
        """Milliseconds of the pass, and its results."""
        with torch.set_grad_enabled(what == "backward"):
            o = forward()

            def backward():
                return torch.autograd.grad(o, inputs, do, retain_graph=True)

            call = backward if what == "backward" else forward
            results = call() if what == "backward" else (o,)
            times = benchmark.milliseconds(itertools.repeat(call), device, repeats)
        return sorted(times)[len(times) // 2], results

    for what, chosen, sizes in _kernels(blkq, blkk):
        key = launch.table_key(chosen, q, *sizes)
        default = chosen(q, *sizes)
        before, right = timed(what)
        best, fastest, tried = default, before, 0
        trials = list(_trials(chosen.__name__, default, q, *sizes))
        table = launch.table(q.device)
        kept = table.get(key)
        for i, trial in enumerate(trials):
            if on_trial:
                on_trial(key, i + 1, len(trials))
            table[key] = trial
            try:
                median, results = timed(what)
            except Exception as error:
                if type(error).__name__ not in ("OutOfResources", "CompilationError", "PTXASError"):
                    raise
                continue  # these tiles do not fit this GPU
            tried += 1
            if all(_same(a, b) for a, b in zip(results, right, strict=True)) and median < fastest * WORTHWHILE:
                best, fastest = trial, median
        if best is not default:
            table[key] = best
        elif kept is None:
            table.pop(key, None)
        else:
            table[key] = kept
        yield Found(key, what, best, before, fastest, tried)


def _kernels(blkq, blkk):
    """The pass that each kernel is timed in, its function in launch.py and the sizes that this takes."""
    return (
        ("forward", launch.prepare_config, ()),
        ("forward", launch.forward_config, (blkq, blkk)),
        ("backward", launch.linear_q_config, (1,)),
        ("backward", launch.linear_k_config, (1,)),
        ("backward", launch.dq_config, (blkq, blkk)),
        ("backward", launch.dkdv_config, (blkq, blkk)),
    )


def _trials(name: str, default: Launch, q, *sizes) -> Iterator[Launch]:
    """Tiles worth a try, the default left out. Those of scores must divide blocks, or be several of them."""
    pipelines = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3, 4)]
    if name == "prepare_config":
        shapes = [{"rows": rows} for rows in (128, 256, 512)]
    elif name == "linear_q_config":
        shapes = [
            {"rows": rows, "block_r": r} for rows in (32, 64, 128) for r in (32, 64, launch.block_d(q.shape[-1]))
        ]
    elif name == "linear_k_config":
        shapes = [{"rows": rows, "programs": programs} for rows in (32, 64) for programs in (264, 528, 1056)]
    else:
        blkq, blkk = sizes
        tiles = (16, 32, 64, 128)
        shapes = [{"block_m": m, "block_n": n} for m in tiles for n in tiles if _fits(name, m, n, blkq, blkk)]
    row = launch.block_d(q.shape[-1]) * q.element_size()
    for shape, pipeline in itertools.product(shapes, pipelines):
        trial = replace(default, **shape, **pipeline)
        if name in ("forward_config", "dq_config", "dkdv_config"):
            fixed, streamed = (
                (trial.block_n, trial.block_m) if name == "dkdv_config" else (trial.block_m, trial.block_n)
            )
            if (fixed + 2 * trial.num_stages * streamed) * row > launch.shared_memory(q.device):
                continue
        if trial != default:
            yield trial


def _fits(name, block_m, block_n, blkq, blkk):
    whole, streamed, block = (block_n, block_m, blkq) if name == "dkdv_config" else (block_m, block_n, blkk)
    of = blkk if name == "dkdv_config" else blkq
    return (
        of % whole == 0
        and whole >= min(of, 32)
        and streamed >= 32
        and max(streamed, block) % min(streamed, block) == 0
    )


def _same(a, b):
    return torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05 * b.float().abs().max().item())
