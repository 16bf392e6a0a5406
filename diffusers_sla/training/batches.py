"""Batches by number: what a micro-step trains on follows from the seed and its number alone, so a run can resume."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..apply import sla_disabled
from ..generation import Request
from .calls import DenoiserCall, denoise, first, moved, record_calls
from .conditions import Conditions
from .data import Order, mix
from .latents import pack
from .objective import Objective, sample_latents


@dataclass
class Batch:
    """arguments: of one call of the denoiser, by position and by name. target: what it should give."""

    args: tuple
    kwargs: dict[str, Any]
    target: Tensor


class Teacher:
    """The denoiser as it was: dense, and without what the run trains.

    Full fine-tuning needs a copy of it; otherwise adapters and SLA are switched off for as long as it is asked.
    """

    def __init__(self, pipe: Any, component: str, model: Any, trains_all: bool):
        self.pipe, self.component, self.model = pipe, component, model
        self.copy = copy.deepcopy(model).eval().requires_grad_(False) if trains_all else None

    @contextlib.contextmanager
    def teaching(self) -> Iterator[Any]:
        """The pipeline runs with the teacher inside the block, which gets it."""
        if self.copy is not None:
            setattr(self.pipe, self.component, self.copy)
            try:
                yield self.copy
            finally:
                setattr(self.pipe, self.component, self.model)
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for module in adapters:
            module.enable_adapters(False)
        try:
            with sla_disabled(self.model):
                yield self.model
        finally:
            for module in adapters:
                module.enable_adapters(True)


class DataBatches:
    """Noisy latents of a data set with their captions; the target is the scheduler's, or the teacher's output."""

    def __init__(
        self, pipe: Any, conditions: Conditions, latents: list[Path], captions: list[Path], empty: Path | None,
        order: Order, *, proportion_empty: float, device: torch.device, dtype: torch.dtype, teacher: Teacher | None,
    ):  # fmt: skip
        self.pipe, self.conditions, self.objective = pipe, conditions, Objective(pipe.scheduler)
        self.latents, self.captions, self.empty, self.order = latents, captions, empty, order
        self.proportion_empty, self.device, self.dtype, self.teacher = proportion_empty, device, dtype, teacher
        self._load = functools.lru_cache(maxsize=4096)(functools.partial(torch.load, weights_only=True))

    def __call__(self, micro_step: int) -> Batch:
        generator = torch.Generator().manual_seed(mix(self.order.seed, 2, micro_step, self.order.rank))
        chosen = self.order.indices(micro_step)
        dropped = (torch.rand(len(chosen), generator=generator) < self.proportion_empty).tolist()
        captions = [self.empty if drop else self.captions[i] for i, drop in zip(chosen, dropped, strict=True)]
        kwargs = moved(self.conditions.join([self._load(path) for path in captions]), self.device)
        drawn = []
        for stored in (self._load(self.latents[i]) for i in chosen):
            drawn.append(sample_latents(stored["mean"], stored.get("std"), generator))
        latents = pack(self.pipe, torch.stack(drawn), self.conditions.sample_shape).to(self.device)
        noisy, timestep, target = self.objective.draw(latents, generator)
        kwargs[self.conditions.sample_name] = noisy.to(self.dtype)
        kwargs[self.conditions.timestep_name] = (timestep * self.conditions.timestep_scale).to(
            self.conditions.timestep_dtype
        )
        if self.teacher is not None:
            with torch.no_grad(), self.teacher.teaching() as model:
                target = first(model(**kwargs))
        return Batch((), kwargs, target)


class RolloutBatches:
    """The calls the teacher's pipeline makes of its denoiser while it generates from prompts, in random order.

    One rollout serves as many micro-steps as it has calls. Guidance doubles a pipeline's calls or their batch; what
    the pipeline does is what is learned.
    """

    def __init__(
        self, pipe: Any, component: str, requests: Callable[[int], Request], order: Order, teacher: Teacher,
        device: torch.device,
    ):  # fmt: skip
        self.pipe, self.component, self.requests, self.order = pipe, component, requests, order
        self.teacher, self.device = teacher, device
        self.per_rollout = len(self._rollout(0))

    def __call__(self, micro_step: int) -> Batch:
        rollout, place = divmod(micro_step, self.per_rollout)
        calls = self._rollout(rollout)
        call = calls[place % len(calls)]
        args, kwargs = (moved(x, self.device) for x in (call.args, call.kwargs))
        return Batch(args, kwargs, call.output.to(self.device))

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _rollout(self, number: int) -> list[DenoiserCall]:
        request = self.requests(number * self.order.processes + self.order.rank)
        with self.teacher.teaching(), record_calls(self.pipe, device="cpu") as calls:
            denoise(self.pipe, request)
        calls = [call for call in calls if call.component == self.component]
        generator = torch.Generator().manual_seed(mix(self.order.seed, 3, number, self.order.rank))
        return [calls[i] for i in torch.randperm(len(calls), generator=generator).tolist()]
