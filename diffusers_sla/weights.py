"""Between models and state files: saving and loading the projections of a pipeline."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .apply import apply_sla, self_attention_layers, sla_layers
from .config import SLAConfig
from .errors import (
    SLAConfigError,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateFormatError,
    SLAStateMismatchError,
)
from .state import PT_NAME, SAFETENSORS_NAME, SLAState, read_state, write_state


def sla_state(model_or_pipe: Any) -> SLAState:
    """The settings and projections that a model or pipeline runs with, as they go into a file.

    Raises:
        SLAStateError: SLA is not installed, or its layers have different settings.
    """
    layers = sla_layers(model_or_pipe)
    if not layers:
        raise SLAStateError("there is no SLA on this model; apply_sla(model) puts it there")
    configs = {layer.config for layer in layers.values()}
    if len(configs) > 1:
        raise SLAStateError("a state file holds one set of settings, and these layers have several")
    state = {}
    for name, layer in layers.items():
        tensors = {
            key.replace("_weight", ".weight").replace("_bias", ".bias"): _whole(parameter)
            for key, parameter in layer.state.named_parameters(remove_duplicate=False)
        }
        state[name] = tensors
    return SLAState(configs.pop().to_dict(), state, {"torch": torch.__version__.split("+")[0]})


def save_sla_weights(model_or_pipe: Any, folder: str | os.PathLike) -> Path:
    """Write `sla_attention.pt` and `sla_attention.safetensors` into `folder` and return it.

    Raises:
        SLAStateError: SLA is not installed.
    """
    state = sla_state(model_or_pipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PT_NAME, SAFETENSORS_NAME):
        write_state(state, folder / name)
    return folder


def load_sla_weights(
    model_or_pipe: Any,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    config: SLAConfig | Mapping[str, Any] | str | None = None,
    override: bool = False,
    strict: bool | None = None,
) -> Any:
    """Install SLA with the settings and projections of a state file; returns what was passed. All or nothing.

    Args:
        model_or_pipe: A diffusers model or pipeline, with SLA installed or not.
        source: The file, a folder that has one, or the dict in it.
        config: Settings to use instead of the file's; only with `override` where they contradict.
        override: Let `config`, or the settings installed, win over those in the file.
        strict: See SLAAttnProcessor.

    Raises:
        SLAStateNotFoundError, SLAStateFormatError, SLAStateVersionError: See `read_state`.
        SLAStateMismatchError: The file is for other layers or head sizes.
        SLASettingsConflictError: Its settings contradict those passed or installed.
    """
    state = read_state(source)
    expected = self_attention_layers(model_or_pipe)
    installed = sla_layers(model_or_pipe)
    wanted = SLAConfig.parse(config) if config is not None else None
    if wanted is None and installed:
        wanted = next(iter(installed.values())).config
    chosen = _settings(state, wanted, override)
    tensors = _fit(state, expected, chosen)

    apply_sla(model_or_pipe, chosen, strict=strict)
    with torch.no_grad():
        for name, layer in sla_layers(model_or_pipe).items():
            if "proj_s.weight" in tensors[name]:
                layer.state.add_proj_s()
            else:
                layer.state.proj_s_weight = None
            for key, tensor in tensors[name].items():
                getattr(layer.state, key.replace(".", "_")).copy_(tensor)
    return model_or_pipe


def replay_sla_weights(model_or_pipe: Any, source: str | os.PathLike | Mapping[str, Any]) -> SLAState:
    """Copy a state file into the parameters that the layers already have, for an optimizer holds them; returns it.

    Raises:
        SLAStateError: As `load_sla_weights`; also where only one of the two has proj_s. Nothing is changed then.
    """
    state = read_state(source)
    installed = sla_layers(model_or_pipe)
    if not installed:
        raise SLAStateError("there is no SLA on this model; apply_sla(model) puts it there")
    chosen = _settings(state, next(iter(installed.values())).config, override=False)
    tensors = _fit(state, self_attention_layers(model_or_pipe), chosen)
    for name, layer in installed.items():
        if ("proj_s.weight" in tensors[name]) != (layer.state.proj_s_weight is not None):
            raise SLAStateMismatchError(
                f"only one of {name} and the file has proj_s; load_sla_weights(model, folder) makes the layer like "
                "the file, and has to come before the optimizer is made"
            )
    with torch.no_grad():
        for name, layer in installed.items():
            for key, tensor in tensors[name].items():
                _copy(tensor, getattr(layer.state, key.replace(".", "_")))
    return state


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter on CPU, gathered from every process where FSDP2 has cut it up."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().cpu().clone()


def _copy(tensor: torch.Tensor, parameter: Any) -> None:
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)


def _settings(state: SLAState, wanted: SLAConfig | None, override: bool) -> SLAConfig:
    if state.settings is None:
        if wanted is None:
            raise SLASettingsConflictError("the file holds no settings; pass config=SLAConfig(...)")
        return wanted
    try:
        stored = SLAConfig.parse(state.settings)
    except SLAConfigError as error:
        raise SLAStateFormatError(f"the file's settings are wrong: {error}") from error
    if wanted is None or wanted == stored:
        return stored
    if override:
        return wanted
    differing = [
        f"{name} is {value!r} in the file and {wanted.to_dict()[name]!r} here"
        for name, value in stored.to_dict().items()
        if wanted.to_dict()[name] != value
    ]
    raise SLASettingsConflictError(f"{'; '.join(differing)}. override=True keeps what is here")


def _fit(state: SLAState, expected: dict[str, int], config: SLAConfig) -> dict[str, dict[str, torch.Tensor]]:
    """The file's tensors by the model's layers, every one of them, checked."""
    if state.by_head_dim:
        missing = sorted(set(expected.values()) - set(state.by_head_dim))
        if missing:
            raise SLAStateMismatchError(
                f"the file has projections for head sizes {sorted(state.by_head_dim)}, the model needs {missing[0]}"
            )
        layers = {name: state.by_head_dim[head_dim] for name, head_dim in expected.items()}
    else:
        layers = _renamed(state.layers, expected)
    for problem, names in (
        ("lacks", [name for name in expected if name not in layers]),
        ("is for a model that also has", [name for name in layers if name not in expected]),
    ):
        if names:
            raise SLAStateMismatchError(f"the file {problem} {names[0]} ({len(names)} such layers)")
    needed = set()
    if config.linear != "none":
        needed = {"proj_l.weight", "proj_l.bias"}
        if config.feature_map == "hedgehog":
            needed |= {"phi_q.weight", "phi_k.weight"}
    for name, head_dim in expected.items():
        tensors = layers[name]
        if needed - tensors.keys():
            raise SLAStateMismatchError(f"the file lacks {name}.{min(needed - tensors.keys())}")
        for key, tensor in tensors.items():
            if tensor.shape[0] != head_dim:
                raise SLAStateMismatchError(
                    f"{name}.{key} is for head size {tensor.shape[0]}, the layer has {head_dim}"
                )
    usable = needed | {"proj_s.weight"}
    return {name: {key: t for key, t in layers[name].items() if key in usable} for name in expected}


def _renamed(layers: dict[str, Any], expected: dict[str, int]) -> dict[str, Any]:
    """A bare model is called "transformer" or "unet", whatever component of a pipeline it was saved as."""
    ours, theirs = ({name.partition(".")[0] for name in names} for names in (expected, layers))
    if len(ours) == len(theirs) == 1 and ours != theirs:
        return {f"{min(ours)}.{name.partition('.')[2]}": tensors for name, tensors in layers.items()}
    return layers
