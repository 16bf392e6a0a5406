"""How fast one shape runs: dense attention, FlexAttention over the same blocks, and SLA, in one process.

Inputs are random and rotate; on a GPU each call starts with a cold L2 and is timed by device events, so that launches
are queued while the cache is flushed. Backwards follow one another, as they do in training: their forwards are
launched before. Nothing here prints.
"""

import functools
import gc
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import SLAConfig
from .flops import blocks_kept, dense_flops, sla_flops
from .kernel import select_blocks, sla_attention

PASSES = ("forward", "backward")
INPUT_SETS = 3
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """What is timed: q, k, v [B, H, L, D] and the settings. proj_s: with a projection of the sparse branch too."""

    B: int
    H: int
    L: int
    D: int
    dtype: str = "bfloat16"
    config: SLAConfig = field(default_factory=SLAConfig)
    proj_s: bool = False

    def flops(self, what: str, name: str) -> float:
        """Floating point operations that the answer takes, two for each multiply-add; a backward recomputes scores."""
        sizes = (self.B, self.H, self.L, self.L, self.D)
        share = 1.0 if what == "forward" else 2.5
        if name.startswith("dense"):
            return dense_flops(*sizes) * share
        num_blocks = math.ceil(self.L / self.config.blkk)
        keys = min(self.L, blocks_kept(self.config, num_blocks) * self.config.blkk)
        sparse = dense_flops(self.B, self.H, self.L, keys, self.D) * share
        if name == "flex":
            return sparse
        rest = sla_flops(self.config, *sizes, proj_s=self.proj_s) - sparse / share
        return sparse + rest * (1 if what == "forward" else 2)

    def bytes(self, what: str) -> float:
        """Every input read once and every result written once."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return self.B * self.H * self.L * self.D * size * (4 if what == "forward" else 8)


@dataclass
class Row:
    """Milliseconds: median, 20th and 80th percentile. tflops: of the work really done. floor_share: the time that the
    measured matmul rate or copy bandwidth allows at best, over the median. ratio: the best dense median over this one.
    graph, graph_ratio: the same of the replays of a CUDA graph of the call, which no host can slow down. memory_mib:
    highest allocation above the inputs, of the forward alone or of forward and backward. launches: kernels."""

    name: str
    what: str
    median: float
    p20: float
    p80: float
    tflops: float
    floor_share: float
    memory_mib: float | None = None
    launches: int | None = None
    graph: float | None = None
    ratio: float | None = None
    graph_ratio: float | None = None


@dataclass
class Record:
    """One case's rows with the machine they were measured on."""

    case: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def best_dense(self, what: str) -> Row:
        return min(self._dense(what), key=lambda r: r.median)

    def _dense(self, what: str) -> list[Row]:
        return [r for r in self.rows if r.what == what and r.name.startswith("dense")]

    def _compare(self) -> None:
        for row in self.rows:
            dense = self._dense(row.what)
            row.ratio = min(r.median for r in dense) / row.median
            if row.graph:
                row.graph_ratio = min(r.graph for r in dense if r.graph) / row.graph


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions, and the two rates every floor is computed from: matmul TFLOP/s and copy GB/s, measured."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "triton": triton.__version__, "cuda": torch.version.cuda}
    else:
        facts |= {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return facts


def rates(dtype: str, device: torch.device) -> dict[str, float]:
    """Matmul TFLOP/s of random [n, n] matrices and GB/s of a copy, read and written bytes counted."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    matmul = _median(milliseconds(itertools.repeat(lambda: a @ b), device, 20 if on_gpu else 5))
    source = torch.randn((1 << 28) if on_gpu else (1 << 25), device=device)
    target = torch.empty_like(source)
    copied = _median(milliseconds(itertools.repeat(lambda: target.copy_(source)), device, 20 if on_gpu else 5))
    return {"matmul_tflops": 2 * n**3 / matmul / 1e9, "copy_gbs": 2 * source.numel() * 4 / copied / 1e6}


def run(
    case: Case, device: str | torch.device, *, passes: tuple[str, ...] = PASSES, flex: bool = False, repeats: int = 30,
    measured: dict[str, float] | None = None,
) -> Record:  # fmt: skip
    """Time every implementation that serves the case.

    Args:
        flex: Also time FlexAttention over the same blocks (compiles; the sparse part only).
        repeats: Timed calls of each; the first ones warm up and are not counted.
        measured: `rates` of this machine, if they are known already.
    """
    device = torch.device(device)
    measured = measured or rates(case.dtype, device)
    calls = dict(_implementations(case, device, flex))
    rows = []
    for name, make in calls.items():
        for what in passes:
            rows.append(_measure(case, name, what, make, device, repeats, measured))
    if device.type == "cuda":  # last: where something has been profiled, launches may take the host longer
        for row in rows:
            with torch.set_grad_enabled(row.what == "backward"):
                call = next(_calls(calls[row.name], *_tensors(case, row.what, device)))
                call()  # so that flex has chosen its blocks
                row.launches = _launches(call)
    record = Record(asdict(case), machine(device) | measured, rows)
    record._compare()
    return record


def _implementations(case: Case, device: torch.device, flex: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    if device.type == "cuda":
        for name, backend in _BACKENDS.items():
            if not _serves(backend, torch.zeros(1, 1, 64, case.D, dtype=getattr(torch, case.dtype), device=device)):
                continue

            def dense(q, k, v, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            yield f"dense {name}", dense
    else:
        yield "dense", F.scaled_dot_product_attention
    if flex:
        yield "flex", _flex(case, device)
    yield "sla", _sla(case, device)


def _serves(backend: SDPBackend, x: Tensor) -> bool:
    """Whether a backend has a kernel for such tensors; only trying tells."""
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            return False
        raise
    return True


def _sla(case: Case, device: torch.device) -> Callable[..., Tensor]:
    D = case.D
    eye = torch.eye(D, device=device)

    def matrix():
        return (0.1 * torch.randn(D, D, device=device)).requires_grad_()

    weights: dict[str, Any] = {}
    if case.config.linear != "none":
        weights = {"proj_l_weight": matrix(), "proj_l_bias": torch.zeros(D, device=device, requires_grad=True)}
        if case.config.feature_map == "hedgehog":
            weights["phi_q_weight"] = weights["phi_k_weight"] = matrix()
    if case.proj_s:
        weights["proj_s_weight"] = (eye + matrix()).detach().requires_grad_()
    settings = case.config.kernel_settings()
    return lambda q, k, v: sla_attention(q, k, v, **settings, **weights)


def _flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}
    config = case.config

    def run(q, k, v):
        mask = masks.get(q.data_ptr())
        if mask is None:
            chosen = select_blocks(q.detach(), k.detach(), topk=config.topk, blkq=config.blkq, blkk=config.blkk) == 1
            counts = chosen.sum(-1, dtype=torch.int32)
            indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
            mask = masks[q.data_ptr()] = BlockMask.from_kv_blocks(
                torch.zeros_like(counts), torch.zeros_like(indices), counts, indices, (config.blkq, config.blkk),
                seq_lengths=(case.L, case.L),
            )  # fmt: skip
        return compiled(q, k, v, block_mask=mask)

    return run


def _tensors(case: Case, what: str, device: torch.device) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """Sets of q, k, v, and for a backward dO."""
    generator = torch.Generator(device).manual_seed(0)
    backward = what == "backward"

    def tensor():
        shape = (case.B, case.H, case.L, case.D)
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))

    sets = [tuple(tensor().requires_grad_(backward) for _ in range(3)) for _ in range(INPUT_SETS)]
    return sets, tensor() if backward else None


def _calls(make, sets, do: Tensor | None) -> Iterator[Callable[[], Any]]:
    """Forwards over one set after the other, or where there is a dO backwards, of forwards that all ran before."""
    if do is None:
        calls = [functools.partial(make, *inputs) for inputs in sets]
    else:
        calls = [functools.partial(torch.autograd.grad, make(*x), x, do, retain_graph=True) for x in sets]
    yield from itertools.cycle(calls)


def _measure(case, name, what, make, device, repeats, measured) -> Row:
    sets, do = _tensors(case, what, device)
    with torch.set_grad_enabled(do is not None):
        for _, call in zip(range(INPUT_SETS), _calls(make, sets, do), strict=False):
            call()
        memory = graph = None
        if device.type == "cuda":
            memory = _extra_memory(sets[0], make, do)
            graph = _median(milliseconds(itertools.repeat(_captured(_calls(make, sets, do))), device, repeats))
        times = milliseconds(_calls(make, sets, do), device, repeats)
    times.sort()
    median = _median(times)
    flops = case.flops(what, name)
    floor = max(flops / measured["matmul_tflops"] / 1e9, case.bytes(what) / measured["copy_gbs"] / 1e6)
    return Row(
        name, what, median, times[len(times) // 5], times[len(times) * 4 // 5], flops / median / 1e9, floor / median,
        memory, graph=graph,
    )  # fmt: skip


def _captured(calls: Iterator[Callable[[], Any]]) -> Callable[[], Any]:
    """The next call as a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = next(calls)  # here, as a backward runs on the stream of its forward
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def milliseconds(calls: Iterator[Callable[[], Any]], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of `repeats` calls, after three that are not counted."""
    if device.type != "cuda":
        seconds = []
        for call in itertools.islice(calls, repeats + 1):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return [second * 1e3 for second in seconds[1:]]
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device)
    events = []
    for call in itertools.islice(calls, repeats + 3):
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        events.append((before, after))
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events[3:]]


def _extra_memory(inputs, make, do) -> float:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = make(*inputs)
    gradients = None if do is None else torch.autograd.grad(o, inputs, do)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del gradients
    return peak / 2**20


def _launches(call) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
