"""What one forward of a denoiser tells its layers: how many of the tokens are image, and whether the step stays dense.

A hook on the model notes both before each forward, in an object that the model's processors share. Nothing here is
process-wide, and nothing waits for the device: the step is the scheduler's own counter.
"""

import inspect
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .config import SLAConfig
from .errors import SLAUnsupportedError
from .families import Family

logger = logging.getLogger(__name__)

_DEFAULT = "set_default_attn_processor"


class Denoising:
    """What is true of the forward under way.

    image: [image tokens in the layers' sequence, 0], or None where the layers see the text by themselves. It is a
    tensor because torch.compile follows a size that changes, and compiles anew for every other number.
    dense: the schedule keeps this step dense. step: (index, number of steps), set by hand where no pipeline counts.
    unknown: forwards whose step nobody knew although the schedule asks for it.
    """

    def __init__(self, family: Family, config: SLAConfig, model: nn.Module, pipe: Any | None):
        self.family = family
        self.dense_steps = config.dense_steps
        self.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.pipe = None if pipe is None else weakref.ref(pipe)
        self.step: tuple[int, int] | None = None
        self.image: Tensor | None = None
        self.dense = False
        self.unknown = 0

    def note(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self.arguments, args, strict=False), **kwargs)
        if self.family.image_tokens is not None:
            some = next(x for x in inputs.values() if isinstance(x, Tensor))
            self.image = some.new_empty((self.family.image_tokens(model, inputs), 0))
        if self.dense_steps:
            step = self.step or self._scheduler_step(inputs)
            self.dense = step is not None and any(step[0] == (s if s >= 0 else step[1] + s) for s in self.dense_steps)
            if step is None:
                if not self.unknown:
                    logger.warning(
                        "dense_steps has no effect: nobody says which step this is. Call apply_sla with the pipeline, "
                        "or use sla_step() around each call of the model."
                    )
                self.unknown += 1

    def _scheduler_step(self, inputs: dict[str, Any]) -> tuple[int, int] | None:
        """(step, number of steps) of this run of the pipeline that SLA was applied to."""
        pipe = None if self.pipe is None else self.pipe()
        scheduler: Any = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        if hasattr(scheduler, "step_index"):
            begin = getattr(scheduler, "begin_index", None) or 0
            index = begin if scheduler.step_index is None else scheduler.step_index
            return index - begin, len(timesteps) - begin
        # Schedulers without a counter (DDIM, DDPM, PNDM): the timestep itself, one wait for the device.
        timestep = inputs.get("timestep")
        if timestep is None:
            return None
        value = float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
        values = [float(t) for t in timesteps.tolist()]
        return (values.index(value), len(values)) if value in values else None

    def __getstate__(self):
        return {**self.__dict__, "pipe": None}  # a copy belongs to no pipeline, and a weak reference does not pickle


def install(model: nn.Module, denoising: Denoising) -> None:
    """Let `denoising` take note of every forward of `model`, in place of an earlier one."""
    remove(model)
    model.__dict__["_sla_denoising"] = denoising
    if hasattr(type(model), _DEFAULT):  # each model class has its own; it fails with SLA, or drops it
        model.__dict__[_DEFAULT] = _refuse_default
    if denoising.family.image_tokens is not None or denoising.dense_steps:
        model.__dict__["_sla_hook"] = model.register_forward_pre_hook(_note, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    model.__dict__.pop("_sla_denoising", None)
    model.__dict__.pop(_DEFAULT, None)
    hook = model.__dict__.pop("_sla_hook", None)
    if hook is not None:
        hook.remove()


def _refuse_default() -> None:
    raise SLAUnsupportedError(f"{_DEFAULT} would replace SLA and its projections; call remove_sla(model) first")


@torch.compiler.disable  # it runs between the caller and the compiled model, whose graphs see what it noted
def _note(model, args, kwargs):
    model._sla_denoising.note(model, args, kwargs)
