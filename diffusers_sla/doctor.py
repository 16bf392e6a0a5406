"""Whether this machine can run SLA, and what a bug report has to say about it."""

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .hub import hub_status
from .kernel import sla_attention
from .state import PT_NAME, SLAState, read_state, write_state

PACKAGES = (
    "diffusers-sla", "torch", "triton", "diffusers", "huggingface_hub", "hf-xet", "safetensors", "transformers",
    "accelerate", "peft", "kernels", "gradio",
)  # fmt: skip
VARIABLES = ("CUDA_", "HF_", "TRITON_", "PYTORCH_", "TORCH_", "DIFFUSERS_", "OMP_", "NO_PROXY", "HTTPS_PROXY")


@dataclass
class Check:
    """passed: None where it does not apply here."""

    name: str
    passed: bool | None
    found: str


@dataclass
class Report:
    """str() gives a block to paste into a bug report: no token, and no path but those in environment variables."""

    versions: dict[str, str]
    machine: dict[str, str]
    environment: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"checks": [vars(check) for check in self.checks], "passed": self.passed}

    def __str__(self) -> str:
        def lines(title: str, values: dict[str, str]) -> list[str]:
            return [f"{title}:", *(f"  {name}: {value}" for name, value in values.items())]

        marks = {True: "ok", False: "FAILED", None: "skipped"}
        checks = {check.name: f"{marks[check.passed]} - {check.found}" for check in self.checks}
        return "\n".join(
            [*lines("versions", self.versions), *lines("machine", self.machine),
             *lines("environment", self.environment), *lines("checks", checks)]
        )  # fmt: skip


def examine(*, offline: bool = False) -> Report:
    """Versions, hardware, and a small run of every implementation against the definition of what SLA computes.

    Args:
        offline: Do not ask the Hub.
    """
    report = Report(
        {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}, _machine(), _environment()
    )
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    report.checks = [
        _check("eager implementation", lambda: _agreement("eager", "cpu", torch.float32)),
        _check(
            "triton kernels",
            (lambda: _agreement("triton", "cuda", torch.bfloat16)) if gpu == "cuda" else None,
            "they need a CUDA, ROCm or XPU device; the eager implementation serves this machine",
        ),
        _check(
            "eager implementation on mps",
            (lambda: _agreement("eager", "mps", torch.float32)) if gpu == "mps" else None,
            "there is no such device",
        ),
        _check("state files", _round_trip),
        _check("hub", None if offline else _hub, "not asked, as wished"),
    ]
    return report


def _check(name: str, run: Callable[[], str] | None, otherwise: str = "") -> Check:
    if run is None:
        return Check(name, None, otherwise)
    try:
        return Check(name, True, run())
    except Exception as error:  # whatever breaks here is the finding
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(name, False, f"{type(error).__name__}: {first}")


def _agreement(impl: str, device: str, dtype: torch.dtype) -> str:
    """The largest error of output and gradients against the definition, which stays below what the dtype can tell."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=generator) for _ in range(3))
    weight = torch.randn(64, 64, generator=generator) / 8
    results = []
    for chosen, where, kind in ((impl, device, dtype), ("reference", "cpu", torch.float64)):
        inputs = [x.to(dtype).to(where, kind).clone().requires_grad_() for x in (q, k, v)]
        o = sla_attention(
            *inputs, topk=0.4, blkq=64, blkk=64, proj_l_weight=weight.to(where), proj_l_bias=weight[0].to(where),
            impl=chosen,
        )  # fmt: skip
        o.double().sum().backward()
        results.append([o.detach(), *(x.grad for x in inputs)])
    errors = [(a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]
    worst, allowed = float(max(errors)), 64 * torch.finfo(dtype).eps
    if not worst <= allowed:
        raise ValueError(f"off by {worst:.1e} relative to the definition, {allowed:.1e} is allowed")
    return f"forward and backward within {worst:.1e} of the definition"


def _round_trip() -> str:
    state = SLAState({}, {"transformer.blocks.0.attn1": {"proj_l.weight": torch.eye(4), "proj_l.bias": torch.ones(4)}})
    with tempfile.TemporaryDirectory() as folder:
        write_state(state, os.path.join(folder, PT_NAME))
        if read_state(folder).digest() != state.digest():
            raise ValueError("what was written is not what was read")
    return "written and read"


def _hub() -> str:
    status = hub_status()
    if not status["reachable"]:
        raise ConnectionError(status.get("problem"))
    if "problem" in status:
        raise PermissionError(status["problem"])
    user = f"logged in as {status['user']}" if status["token"] else "reachable, no token: `hf auth login` for pushing"
    return f"{status['endpoint']}: {user}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, str]:
    machine = {"platform": platform.platform(), "cpu": f"{platform.machine()}, {os.cpu_count()} cores"}
    platforms = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    machine["torch built for"] = next((f"{name} {found}" for name, found in platforms.items() if found), "CPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        machine[f"gpu {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability "
            f"{properties.major}.{properties.minor}"
        )
    return machine


def _environment() -> dict[str, str]:
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    secret = ("TOKEN", "SECRET", "PASSWORD", "KEY", "PROXY")
    return {name: "(set)" if any(word in name for word in secret) else value for name, value in found.items()}
