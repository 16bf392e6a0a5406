"""Tile shapes by measurement: kernel by kernel, the tiles that make its pass fastest.

The entries stand in `kernel/launch.py`'s table, which `save_table` writes. Nothing here prints.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from . import benchmark
from .config import SLAConfig
from .kernel import launch, sla_attention
from .kernel.launch import Launch

WORTHWHILE = 0.99  # a change must save more than a hundredth: below that it is noise


@dataclass(frozen=True)
class Found:
    """One kernel's result. before, after: milliseconds of the pass it is part of, with the tiles there were and with
    `launch`; tried: how many tile shapes ran; crashed: those that the compiler made read where there is nothing."""

    key: str
    what: str
    launch: Launch
    before: float
    after: float
    tried: int
    crashed: tuple[Launch, ...] = ()


@dataclass(frozen=True)
class Calls:
    """What is timed: batch 1, H heads of L tokens and head size D, forward or backward."""

    D: int
    dtype: str = "bfloat16"
    blkq: int = 64
    blkk: int = 64
    H: int = 8
    L: int = 16384
    topk: float = 0.1

    def make(self, device) -> tuple[Tensor, Callable[[str], tuple[Callable, tuple]]]:
        """q, and a function that gives the call of a pass and its results."""
        torch.manual_seed(0)
        config = SLAConfig(topk=self.topk, blkq=self.blkq, blkk=self.blkk)
        shape, dtype = (1, self.H, self.L, self.D), getattr(torch, self.dtype)
        q, k, v, do = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        weight, bias = torch.randn(self.D, self.D, device=device) * 0.1, torch.zeros(self.D, device=device)

        def forward():
            return sla_attention(
                *inputs, **config.kernel_settings(), proj_l_weight=weight, proj_l_bias=bias, impl="triton"
            )

        def of_pass(what):
            if what == "forward":
                return forward, (forward(),)
            o = forward()

            def backward():
                return torch.autograd.grad(o, inputs, do, retain_graph=True)

            return backward, backward()

        return q, of_pass


def tune(
    device: str | torch.device, calls: Calls, *, repeats: int = 20, jobs: int = 8,
    on_trial: Callable[[str, int, int], None] | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Tune the kernels for one head size, dtype and pair of block sizes; the table keeps what is better.

    Args:
        jobs: Processes that compile the tiles of a kernel before they are timed.
        on_trial: Called with a kernel's name, the number of the trial and the number of trials.
    """
    device = torch.device(device)
    q, of_pass = calls.make(device)
    table = launch.table(q.device)

    def timed(what):
        """Milliseconds of the pass, and its results."""
        with torch.set_grad_enabled(what == "backward"):
            call, results = of_pass(what)
            times = benchmark.milliseconds(itertools.repeat(call), device, repeats)
        return sorted(times)[len(times) // 2], results

    with Workers(jobs, _compiles) as workers:
        for what, chosen, sizes in _kernels(calls.blkq, calls.blkk):
            key = launch.table_key(chosen, q, *sizes)
            default = chosen(q, *sizes)
            before, right = timed(what)
            best, fastest, tried = default, before, 0
            trials = list(_trials(chosen.__name__, default, q, *sizes))
            kept = table.get(key)
            outcomes = ["fits"] * len(trials)
            if device.type == "cuda":  # the interpreter compiles nothing
                outcomes = workers.map([(device, calls, what, dict(table) | {key: t}) for t in trials])
            for i, (trial, outcome) in enumerate(zip(trials, outcomes, strict=True)):
                if on_trial:
                    on_trial(key, i + 1, len(trials))
                if outcome != "fits":
                    continue
                table[key] = trial
                median, results = timed(what)
                tried += 1
                if all(_same(a, b) for a, b in zip(results, right, strict=True)) and median < fastest * WORTHWHILE:
                    best, fastest = trial, median
            if best is not default:
                table[key] = best
            elif kept is None:
                table.pop(key, None)
            else:
                table[key] = kept
            crashed = tuple(t for t, outcome in zip(trials, outcomes, strict=True) if outcome == "crashed")
            yield Found(key, what, best, before, fastest, tried, crashed)


class Workers:
    """Processes that each do one piece of work at a time. One that the work leaves broken, as an illegal address does
    with all that a process has on a GPU, is replaced."""

    def __init__(self, jobs: int, do: Callable[[Any], str]):
        self.do, self.threads = do, ThreadPoolExecutor(jobs)
        self.idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(jobs):
            self.idle.put(self._start())

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"))

    def map(self, works: Iterable[Any]) -> list[str]:
        """What `do` gives for each; "crashed" where the process did not live to say so."""
        return list(self.threads.map(self._one, works))

    def _one(self, work: Any) -> str:
        process = self.idle.get()
        try:
            outcome = process.submit(self.do, work).result()
        except BrokenProcessPool:
            outcome = "crashed"
        if outcome == "crashed":
            process.shutdown(wait=False)
            process = self._start()
        self.idle.put(process)
        return outcome

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().shutdown()


def _compiles(work) -> str:
    """In a process of its own: run the pass once with a table, so that its kernels are in Triton's cache. "fits", "too
    large" for this GPU, or "crashed"."""
    device, calls, what, table = work
    own = launch.table(torch.device(device.type, torch.cuda.current_device()))
    own.clear()
    own.update(table)
    try:
        with torch.set_grad_enabled(what == "backward"):
            calls.make(device)[1](what)
        torch.cuda.synchronize()
    except Exception as error:
        if type(error).__name__ in ("OutOfResources", "CompilationError", "PTXASError"):
            return "too large"
        if "CUDA error" in str(error):
            return "crashed"
        raise
    return "fits"


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
    shapes: list[dict[str, Any]]
    pipelines: list[dict[str, Any]] = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3, 4)]
    if name == "prepare_config":
        shapes = [{"rows": rows} for rows in (128, 256, 512)]
    elif name == "linear_q_config":
        # Not narrower tiles of M with more stages: on Hopper, Triton 3.6 makes some of them read out of bounds.
        shapes = [{"rows": rows} for rows in (32, 64, 128)]
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
