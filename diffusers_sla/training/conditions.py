"""What a pipeline passes to its denoiser besides the noisy sample, learned by watching the pipeline itself.

Every pipeline has its own names for prompts, pooled prompts, positions, sizes and guidance. Instead of a table of
them, a pipeline is asked for a sample, and stopped at its first call of the denoiser: that call says all of it. Asked
for one and for two samples, it says which arguments have a batch dimension.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..apply import denoisers
from ..errors import SLAUnsupportedError
from ..generation import Request
from .calls import moved

BATCHED, SHARED = "batched", "shared"


class _FirstCall(Exception):
    pass


class Conditions:
    """The denoiser's arguments for a caption or class.

    Attributes: sample_name, timestep_name: the arguments that training draws itself. sample_shape: of the sample as
    the denoiser takes it, without the batch dimension. timestep_scale: what the pipeline multiplies the scheduler's
    timestep with.

    Args:
        pipe: A diffusers pipeline.
        component: Which of its denoisers.
        request: Sizes and guidance; its prompt or class serves as an example.

    Raises:
        SLAConfigError: The request does not suit the pipeline.
        SLAUnsupportedError: The pipeline makes no call that could be learned from.
    """

    def __init__(self, pipe: Any, component: str, request: Request):
        self.pipe, self.request = pipe, request
        self.model = denoisers(pipe)[component]
        self.arguments = request.arguments(pipe)
        parameters = list(inspect.signature(self.model.forward).parameters)
        self.sample_name = parameters[0]
        self.timestep_name = next((name for name in parameters if name in ("timestep", "timesteps")), "timestep")
        one, two = (self._first_call(self.arguments, count) for count in (1, 2))
        sample, timestep = one[self.sample_name], one[self.timestep_name]
        self.sample_shape = tuple(sample.shape[1:])
        self.timestep_dtype = timestep.dtype
        self._marks = {
            name: _mark(one[name], two[name], f"{type(pipe).__name__}: {name}")
            for name in one
            if name not in (self.sample_name, self.timestep_name)
        }
        scheduled = float(pipe.scheduler.timesteps[0])
        self.timestep_scale = timestep.flatten()[0].item() / scheduled
        known = (1.0, 1 / pipe.scheduler.config.num_train_timesteps)
        nearest = min(known, key=lambda scale: abs(scale - self.timestep_scale))
        # bfloat16 has three digits
        if abs(self.timestep_scale / nearest - 1) > 1e-2 or timestep.dim() > 1:
            raise SLAUnsupportedError(
                f"{type(pipe).__name__} passes timestep {timestep.flatten()[0].item():g} of shape "
                f"{tuple(timestep.shape)} for the scheduler's {scheduled:g}, which training on data cannot follow; "
                "objective 'distill' without data needs no timesteps"
            )
        self.timestep_scale = nearest

    def encode(self, condition: str | int | None) -> dict[str, Any]:
        """The arguments for one caption or class on the CPU; None: the empty prompt, or the class for "no class"."""
        arguments = dict(self.arguments)
        if "class_labels" in arguments:
            if condition is None:
                arguments["class_labels"] = [self.model.config.num_embeds_ada_norm]
            else:
                arguments |= Request(class_label=condition).arguments(self.pipe)
        else:
            arguments["prompt"] = "" if condition is None else str(condition)
        call = self._first_call(arguments, 1)
        return {name: moved(call[name], "cpu") for name in self._marks}

    def join(self, conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The arguments for a batch of what `encode` gave.

        Raises:
            SLAUnsupportedError: They differ in length, and the model has no way to say so.
        """
        return {name: _join([one[name] for one in conditions], mark, name) for name, mark in self._marks.items()}

    @torch.no_grad()
    def _first_call(self, arguments: dict[str, Any], count: int) -> dict[str, Any]:
        arguments = dict(arguments)
        for name in ("prompt", "class_labels"):
            if name in arguments:
                value = arguments[name]
                arguments[name] = (value if isinstance(value, list) else [value]) * count
        # Guidance would double the batch; binning would move to another size than the data's.
        plain = {"guidance_scale": 1.0, "use_resolution_binning": False, "num_inference_steps": 2}
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        arguments |= {name: value for name, value in plain.items() if name in accepted}
        if self.request.guidance_scale is not None and getattr(self.model.config, "guidance_embeds", False):
            arguments["guidance_scale"] = self.request.guidance_scale  # an input of the model, not of the sampler
        seen: dict[str, Any] = {}

        def stop(module, args, kwargs):
            seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            raise _FirstCall

        handle = self.model.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.pipe(**arguments)
        except _FirstCall:
            return seen
        finally:
            handle.remove()
        raise SLAUnsupportedError(f"{type(self.pipe).__name__} never called its {type(self.model).__name__}")


def _mark(one: Any, two: Any, where: str) -> Any:
    if isinstance(one, Tensor):
        if one.shape == two.shape:
            return SHARED
        if one.dim() and two.shape == (2 * one.shape[0], *one.shape[1:]):
            return BATCHED
        raise SLAUnsupportedError(
            f"{where} has shape {tuple(one.shape)} for one sample and {tuple(two.shape)} for two"
        )
    if isinstance(one, dict):
        return {key: _mark(one[key], two[key], f"{where}.{key}") for key in one}
    if isinstance(one, list | tuple) and len(two) == 2 * len(one) > 0:
        return BATCHED
    return SHARED


def _join(values: Sequence[Any], mark: Any, where: str) -> Any:
    if isinstance(mark, dict):
        return {key: _join([value[key] for value in values], one, f"{where}.{key}") for key, one in mark.items()}
    first = values[0]
    if isinstance(first, Tensor) and len({value.shape for value in values}) > 1:
        shapes = " and ".join(sorted({str(tuple(value.shape)) for value in values}))
        raise SLAUnsupportedError(f"captions of one batch give {where} of shapes {shapes}; use batches of 1")
    if mark == SHARED:
        return first
    return torch.cat(list(values)) if isinstance(first, Tensor) else [part for value in values for part in value]
