"""What a run trains, and how it goes into a folder that others can load."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..apply import sla_layers, sla_parameters
from ..errors import SLAConfigError
from ..lora import LORA_NAME

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class Trained:
    """The trainable part of a denoiser: "full", a LoRA adapter ("lora"), or SLA's projections alone ("projection").

    Everything else of the model is frozen by the constructor.

    Attributes: backbone: trainable parameters that are not SLA's. projections: SLA's.

    Raises:
        SLAConfigError: No layer has one of the names in `lora_target_modules`.
    """

    def __init__(self, model: Any, component: str, mode: str, *, rank: int, targets: tuple[str, ...], seed: int):
        self.model, self.component, self.mode = model, component, mode
        self.projections = sla_parameters(model)
        model.requires_grad_(mode == "full")
        if mode == "lora":
            self._add_adapter(rank, targets, seed)
        for parameter in self.projections:
            parameter.requires_grad_(True)
        ours = {id(parameter) for parameter in self.projections}
        self.backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.backbone, *self.projections]

    def _add_adapter(self, rank, targets, seed):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, self.model)
            except ValueError as error:
                raise SLAConfigError(f"lora_target_modules {', '.join(targets)}: {error}") from error
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the weights that are not SLA's: `<component>/` for `from_pretrained`, or a LoRA file for
        `load_lora_weights`; nothing for "projection"."""
        folder = Path(folder)
        if self.mode == "full":
            ours = tuple(f"{name.partition('.')[2]}.processor." for name in sla_layers(self.model))
            state = {
                name: tensor.contiguous().cpu()
                for name, tensor in self.model.state_dict().items()
                if not name.startswith(ours)
            }
            (folder / self.component).mkdir(parents=True, exist_ok=True)
            self.model.save_config(folder / self.component)
            _write(state, folder / self.component / WEIGHTS_NAME)
        elif self.mode == "lora":
            tensors = {f"{self.component}.{name}": tensor for name, tensor in self._adapter().items()}
            _write(tensors, folder / LORA_NAME)

    def load(self, folder: str | os.PathLike) -> None:
        """Put what `save` wrote back into the same parameters."""
        folder = Path(folder)
        if self.mode == "full":
            loaded = type(self.model).from_pretrained(folder, subfolder=self.component)
            self.model.load_state_dict(loaded.state_dict())
        elif self.mode == "lora":
            from peft import set_peft_model_state_dict

            prefix = f"{self.component}."
            tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / LORA_NAME).items()}
            set_peft_model_state_dict(self.model, tensors)

    def _adapter(self) -> Mapping[str, Any]:
        from peft import get_peft_model_state_dict

        return {name: tensor.contiguous().cpu() for name, tensor in get_peft_model_state_dict(self.model).items()}


def _write(tensors: Mapping[str, Any], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # safetensors leaves it to its owner alone
