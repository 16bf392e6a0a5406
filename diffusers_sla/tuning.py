"""Tile shapes by measurement: kernel by kernel, the tiles that make its pass fastest.

The entries stand in `kernel/launch.py`'s table, which `save_table` writes. Nothing here prints.
"""

import functools
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
    q = torch.empty(1, 1, 1, calls.D, dtype=getattr(torch, calls.dtype), device=device)
    device, table = q.device, launch.table(q.device)
    # On a GPU in processes of their own: what a tile that reads out of bounds breaks is a process.
    apart = device.type == "cuda"
    with Workers(jobs if apart else 0, _compiles) as compilers, Workers(1 if apart else 0, _times) as timer:
        for what, chosen, x, sizes in _kernels(q, calls.blkq, calls.blkk):
            key = launch.table_key(chosen, x, *sizes)
            default, usual = chosen(x, *sizes), dict(table)
            trials = list(_trials(chosen.__name__, default, x, *sizes))
            works = [Work(device, calls, what, usual | {key: trial}, usual, repeats) for trial in trials]
            outcomes = compilers.map(works) if apart else ["fits"] * len(trials)  # the interpreter compiles nothing
            (before,) = timer.map([Work(device, calls, what, usual, usual, repeats)])
            if isinstance(before, str):
                raise RuntimeError(f"{what} of {key} does not run with the tiles there are, {default}: {before}")
            best, fastest, tried = default, before, 0
            for i, (trial, work) in enumerate(zip(trials, works, strict=True)):
                if on_trial:
                    on_trial(key, i + 1, len(trials))
                if outcomes[i] != "fits":
                    continue
                (median,) = timer.map([work])
                if isinstance(median, str):
                    outcomes[i] = median
                tried += outcomes[i] != "crashed"
                if outcomes[i] == "fits" and median < fastest * WORTHWHILE:
                    best, fastest = trial, median
            table.clear()  # without processes of their own the trials stood in it
            table.update(usual if best is default else usual | {key: best})
            crashed = tuple(t for t, outcome in zip(trials, outcomes, strict=True) if outcome == "crashed")
            yield Found(key, what, best, before, fastest, tried, crashed)


@dataclass(frozen=True)
class Work:
    """A pass to run with the tiles of `table`; the results that it must have are those with `usual`."""

    device: torch.device
    calls: Calls
    what: str
    table: dict[str, Launch]
    usual: dict[str, Launch]
    repeats: int

    def run(self, tiles: dict[str, Launch]) -> tuple[Callable, tuple]:
        """The call, and its results with these tiles."""
        own = launch.table(self.device)
        own.clear()
        own.update(tiles)
        with torch.set_grad_enabled(self.what == "backward"):
            return self.calls.make(self.device)[1](self.what)


class Workers:
    """Processes that each do one piece of work at a time. One that the work leaves broken, as an illegal address does
    with all that a process has on a GPU, is replaced. With 0 jobs this process does the work."""

    def __init__(self, jobs: int, do: Callable[[Any], Any]):
        self.do, self.threads = do, ThreadPoolExecutor(max(1, jobs))
        self.jobs = jobs
        self.idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(jobs):
            self.idle.put(self._start())

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"))

    def map(self, works: Iterable[Any]) -> list[Any]:
        """What `do` gives for each; "crashed" where the process did not live to say so."""
        return list(self.threads.map(self._one, works)) if self.jobs else [self.do(work) for work in works]

    def _one(self, work: Any) -> Any:
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


def _outcome(do: Callable[[], Any]) -> Any:
    """What `do` gives; "too large" for this GPU or "crashed" where it does not run."""
    try:
        return do()
    except Exception as error:
        if type(error).__name__ in ("OutOfResources", "CompilationError", "PTXASError"):
            return "too large"
        if "CUDA error" in str(error):
            return "crashed"
        raise


def _compiles(work: Work) -> str:
    """Run the pass once, so that its kernels are in Triton's cache."""

    def do():
        work.run(work.table)
        torch.cuda.synchronize()
        return "fits"

    return _outcome(do)


@functools.lru_cache(maxsize=1)
def _right(device: torch.device, calls: Calls, what: str, usual: tuple) -> tuple:
    """Results with the usual tiles."""
    return Work(device, calls, what, {}, {}, 0).run(dict(usual))[1]


def _times(work: Work) -> Any:
    """Milliseconds of the pass, or "wrong"."""

    def do():
        right = _right(work.device, work.calls, work.what, tuple(work.usual.items()))
        call, results = work.run(work.table)
        if not all(_same(a, b) for a, b in zip(results, right, strict=True)):
            return "wrong"
        with torch.set_grad_enabled(work.what == "backward"):
            times = benchmark.milliseconds(itertools.repeat(call), work.device, work.repeats)
        return sorted(times)[len(times) // 2]

    return _outcome(do)


def _kernels(q, blkq, blkk):
    """The pass that each kernel is timed in, its function in launch.py, and the tensor and sizes that this takes;
    without those in whose place a kernel in Gluon runs, which has one tile."""
    half = q.dtype == torch.float16
    of_k = (launch.linear_k_float16_config, q.float()) if half else (launch.linear_k_config, q)
    kernels = [
        ("forward", launch.prepare_config, q, (blkk, 1)),
        ("forward", launch.forward_config, q, (blkq, blkk)),
        ("backward", launch.linear_q_config, q, (1,)),
        ("backward", *of_k, (1,)),
        ("backward", launch.dq_config, q, (blkq, blkk)),
        ("backward", launch.dkdv_config, q, (blkq, blkk)),
    ]
    in_gluon = []
    if launch.takes_gluon(q):
        in_gluon = [] if half else [launch.linear_q_config, launch.linear_k_config]
        if blkq >= 64 == blkk:
            in_gluon += [launch.prepare_config, launch.forward_config]
    return [kernel for kernel in kernels if kernel[1] not in in_gluon]


def _trials(name: str, default: Launch, q, *sizes) -> Iterator[Launch]:
    """Tiles worth a try, the default left out. Those of scores must divide blocks, or be several of them."""
    shapes: list[dict[str, Any]]
    pipelines: list[dict[str, Any]] = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3, 4)]
    if name == "prepare_config":
        limits = {default.registers} if q.element_size() == 4 else (None, 128)
        shapes = [{"rows": rows, "registers": limit} for rows in (256, 512, 1024) for limit in limits]
    elif name == "linear_q_config":
        # Not narrower tiles of M with more stages: on Hopper, Triton 3.6 makes some of them read out of bounds.
        shapes = [{"rows": rows} for rows in (32, 64, 128)]
    elif name in ("linear_k_config", "linear_k_float16_config"):
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
