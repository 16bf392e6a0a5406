"""The LoRA that `finetune` trains beside the projections, added to a denoiser's weights and taken out again.

Needs no peft, and works where diffusers has no `load_lora_weights`, such as DiT.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .apply import denoisers
from .errors import SLAStateFormatError, SLAStateMismatchError, SLAStateNotFoundError
from .tensor_files import open_safetensors

LORA_NAME = "pytorch_lora_weights.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def lora_beside(source: Any) -> Path | None:
    """The LoRA in the folder `source`; None where there is none, and for files, dicts and repositories of the Hub."""
    path = Path(source) / LORA_NAME if isinstance(source, str | os.PathLike) else None
    return path if path is not None and path.is_file() else None


@torch.no_grad()
def add_lora(model_or_pipe: Any, source: str | os.PathLike) -> Callable[[], None]:
    """Add a LoRA to the weights, `W + B A`; returns what puts the same weights back, bit for bit. All or nothing.

    Of several, the last one is taken out first, with the model where it was and in the dtype it had: taking out raises
    SLAStateMismatchError after a move.

    Args:
        model_or_pipe: A diffusers model or pipeline, with SLA or without. Its denoisers' linear layers must hold their
            weights themselves: not offloaded one layer at a time, and not wrapped by peft.
        source: The file, or the folder that has it, that `finetune --train lora` wrote: `A` [rank, inputs] and `B`
            [outputs, rank] of every layer, nothing else. Files of others belong to `pipe.load_lora_weights`.

    Raises:
        SLAStateNotFoundError: There is no such file.
        SLAStateFormatError: It is damaged, or holds more than such pairs.
        SLAStateMismatchError: It is for other layers or shapes.
    """
    path = Path(source) / LORA_NAME if os.path.isdir(source) else Path(source)
    if not path.is_file():
        raise SLAStateNotFoundError(f"there is no LoRA {str(path)!r}")
    models = denoisers(model_or_pipe)
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []
    with open_safetensors(path) as (metadata, tensors):
        strange = [*(metadata.keys() - {"format"}), *(key for key in tensors if not key.endswith((_DOWN, _UP)))]
        if strange:
            raise SLAStateFormatError(f"{path} has {min(strange)!r}, which no LoRA of finetune has")
        for layer in sorted({key.removesuffix(_DOWN).removesuffix(_UP) for key in tensors}):
            if layer + _DOWN not in tensors or layer + _UP not in tensors:
                raise SLAStateFormatError(f"{path} has only one of lora_A and lora_B of {layer}")
            weight = _weight(models, layer, path)
            down, up = tensors[layer + _DOWN], tensors[layer + _UP]
            shapes = [list(tensor.shape) for tensor in (down, up)]
            rank, (outputs, inputs) = (shapes[0] or [0])[0], weight.shape
            if shapes != [[rank, inputs], [outputs, rank]]:
                raise SLAStateMismatchError(
                    f"{path}: {layer} has lora_A {shapes[0]} and lora_B {shapes[1]}, the layer {outputs} outputs of "
                    f"{inputs} inputs"
                )
            if 0 in shapes[0] or not all(x.is_floating_point() and x.isfinite().all() for x in (down, up)):
                raise SLAStateFormatError(
                    f"{path}: lora_A or lora_B of {layer} is empty, not floating point, or not finite"
                )
            update = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
            changed.append((weight, (weight.float() + update).to(weight.dtype)))
        if not changed:
            raise SLAStateFormatError(f"{path} holds no LoRA: it has no tensors")
    before = [(weight, weight.data) for weight, _ in changed]

    def put(values):
        for weight, data in values:
            weight.data = data

    def take_out():
        for weight, data in before:
            if (weight.device, weight.dtype) != (data.device, data.dtype):
                raise SLAStateMismatchError(
                    f"the weights were {data.dtype} on {data.device} when the LoRA was added, and are {weight.dtype} "
                    f"on {weight.device}: move them back before it is taken out"
                )
        put(before)

    put(changed)
    return take_out


def _weight(models, layer, path) -> torch.Tensor:
    component, _, name = layer.partition(".")
    try:
        module = models[component].get_submodule(name)
    except (KeyError, AttributeError) as error:
        raise SLAStateMismatchError(f"{path} has {layer}, which the model has not") from error
    if not isinstance(module, nn.Linear) or module.weight.is_meta or not module.weight.is_floating_point():
        raise SLAStateMismatchError(
            f"{path}: the weight of {layer} cannot be added to: the layer is a {type(module).__name__}, or offloaded, "
            "quantised"
        )
    return module.weight
