"""Tiny random diffusers models and inputs for them, by name."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import audio, image, joint, unets, video


class Tiny(NamedTuple):
    """make: returns (model, inputs). layers: how many run SLA. text: tokens each of them keeps, in joint attention.
    calls: SLA calls of one layer in one forward."""

    make: Callable
    layers: int
    text: int = 0
    calls: int = 1


MODELS = {
    name: Tiny(*entry) for module in (unets, image, joint, video, audio) for name, entry in module.MODELS.items()
}

REFUSED = unets.REFUSED | video.REFUSED | audio.REFUSED  # name -> maker of a model of a class that SLA does not serve


def make(name):
    """Model in eval mode and its inputs, the same every time."""
    torch.manual_seed(0)
    model, inputs = MODELS[name].make() if name in MODELS else REFUSED[name]()
    for parameter in model.parameters():  # some models start with layers at zero, behind which nothing shows
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), inputs


def output(model, inputs):
    result = model(**inputs)
    result = result.to_tuple() if hasattr(result, "to_tuple") else result
    while isinstance(result, list | tuple):  # several outputs, or one tensor per sample
        result = result[0]
    return result
