"""The calls a pipeline makes of its denoiser: what calibration checks itself on, and distillation learns from."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..apply import denoisers
from ..generation import Request, stepping


@dataclass
class DenoiserCall:
    """One call. component: whose, such as "transformer". Arguments and output [B, ...] are as the model had them,
    moved to `device` where one was asked for."""

    component: str
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor

    def run(self, model: Any) -> Tensor:
        """The output of `model` for the same input."""
        device = next(model.parameters()).device
        return first(model(*moved(self.args, device), **moved(self.kwargs, device)))


@contextlib.contextmanager
def record_calls(
    pipe: Any, *, wanted: Callable[[], bool] = lambda: True, device: torch.device | str | None = None
) -> Iterator[list[DenoiserCall]]:
    """Collect the calls that a pipeline makes of its denoisers while `wanted()`, moved to `device`."""
    calls: list[DenoiserCall] = []
    handles = []

    def hook(component):
        def keep(module, args, kwargs, output):
            if wanted():
                kept = (moved(x, device) for x in (args, kwargs, first(output).detach()))
                calls.append(DenoiserCall(component, *kept))

        return keep

    for component, model in denoisers(pipe).items():
        handles.append(model.register_forward_hook(hook(component), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def denoise(pipe: Any, request: Request, on_step: Callable[[int], None] = lambda step: None) -> None:
    """Run a pipeline for its denoising alone: nothing is decoded, where the pipeline can leave that out."""
    arguments = request.arguments(pipe)
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments["output_type"] = "latent"
    with stepping(pipe, on_step):
        pipe(**arguments, generator=torch.Generator("cpu").manual_seed(request.seed))


def first(output: Any) -> Tensor:
    """The tensor of a denoiser's output, whether it came as a tuple or as diffusers' output class."""
    return output if isinstance(output, Tensor) else output[0]


def moved(value: Any, device: torch.device | str | None) -> Any:
    """`value` with every tensor in it on `device`; dicts, lists and tuples are made anew, at any depth."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(one, device) for one in value)
    return value
