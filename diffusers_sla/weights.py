"""Between models and state files: saving and loading the projections of a pipeline."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .apply import apply_sla, denoisers, self_attention_layers, sla_layers
from .config import SLAConfig
from .errors import (
    SLAConfigError,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateFormatError,
    SLAStateMismatchError,
    SLAStateNotFoundError,
)
from .hub import Remote, download, is_repo_id
from .state import PT_NAME, SAFETENSORS_NAME, SLAState, read_state, write_state


def sla_state(model_or_pipe: Any, *, meta: Mapping[str, Any] | None = None) -> SLAState:
    """The settings and projections that a model or pipeline runs with, as they go into a file.

    Args:
        meta: What else to record, plain values; the versions in use, the model classes and the base model, where it
            is one of the Hub's, are recorded anyway.

    Raises:
        SLAStateError: SLA is not installed, its layers have different settings, or they are offloaded one at a time.
    """
    layers = sla_layers(model_or_pipe)
    if not layers:
        raise SLAStateError("there is no SLA on this model; apply_sla(model) puts it there")
    away = next((name for name, x in layers.items() if any(p.is_meta for p in x.state.parameters())), None)
    if away is not None:
        raise SLAStateError(
            f"{away} is offloaded one layer at a time, its projections are not there to be read; save them before "
            "enable_sequential_cpu_offload, or after remove_all_hooks"
        )
    configs = {layer.config for layer in layers.values()}
    if len(configs) > 1:
        raise SLAStateError("a state file holds one set of settings, and these layers have several")
    state = {
        name: {
            key.replace("_weight", ".weight").replace("_bias", ".bias"): _whole(parameter)
            for key, parameter in layer.state.named_parameters(remove_duplicate=False)
        }
        for name, layer in layers.items()
    }
    return SLAState(configs.pop().to_dict(), state, _provenance(model_or_pipe) | dict(meta or {}))


def save_sla_weights(model_or_pipe: Any, folder: str | os.PathLike, *, meta: Mapping[str, Any] | None = None) -> Path:
    """Write `sla_attention.pt` and `sla_attention.safetensors` into `folder` and return it.

    Args:
        meta: See `sla_state`; docs/state-file.md names the records that model cards show.

    Raises:
        SLAStateError: SLA is not installed, or a projection holds NaN.
    """
    state = sla_state(model_or_pipe, meta=meta)
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
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Any:
    """Install SLA with the settings and projections of a state file; returns what was passed. All or nothing.

    Args:
        model_or_pipe: A diffusers model or pipeline, with SLA installed or not.
        source: The file, a folder that has one, a repository on the Hub such as "user/repo", or the dict in a file.
        config: Settings to use instead of the file's; only with `override` where they contradict. An SLAConfig has
            all of them; a dict or JSON text those that it names, and the file has the rest.
        override: Let `config`, or the settings installed, win over those in the file.
        strict: See SLAAttnProcessor.
        weight_name: Name of the file, where it is neither `sla_attention.safetensors` nor `sla_attention.pt`.
        subfolder: Folder of the file inside `source`.
        revision, token, cache_dir, local_files_only, force_download: As in `DiffusionPipeline.from_pretrained`.

    Raises:
        SLAStateNotFoundError, SLAStateFormatError, SLAStateVersionError: See `read_state`.
        SLAHubError: The repository, its revision or its file is not there, or cannot be reached. An OSError.
        SLAStateMismatchError: The file is for other layers or head sizes.
        SLASettingsConflictError: Its settings contradict those passed or installed.
    """
    remote = Remote("", revision, subfolder, token, cache_dir, local_files_only, force_download)
    state = read_state(source if isinstance(source, Mapping) else locate_state(source, weight_name, remote))
    installed = sla_layers(model_or_pipe)
    wanted = next(iter(installed.values())).config if config is None and installed else config
    chosen, differing = merge_settings(state, wanted)
    if differing and not override:
        raise SLASettingsConflictError(f"{differing}. override=True keeps what is here")
    tensors = fit(state, self_attention_layers(model_or_pipe, chosen), chosen)

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
    chosen, differing = merge_settings(state, next(iter(installed.values())).config)
    if differing:
        raise SLASettingsConflictError(f"{differing}. A run goes on with the settings it had: give those to apply_sla")
    tensors = fit(state, self_attention_layers(model_or_pipe, chosen), chosen)
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


def settings_for(
    source: str | os.PathLike, given: SLAConfig | Mapping[str, Any] | str | None = None
) -> tuple[SLAConfig, str]:
    """The settings to load a state file with: its own, but for those `given`; and where the two differ, in words.

    Raises:
        SLAStateError, SLAHubError: See `load_sla_weights`.
        SLAConfigError: What is given is unknown or out of range.
    """
    return merge_settings(read_state(locate_state(source, None, Remote(""))), given)


def locate_state(source: str | os.PathLike, weight_name: str | None, remote: Remote) -> Path:
    """Where the state file that `source` names is, downloaded if `source` is a repository. `remote` says how.

    Raises:
        SLAStateNotFoundError, SLAHubError: It is not there.
    """
    if isinstance(source, str) and is_repo_id(source):
        remote.repo_id = source
        return download(remote, *([weight_name] if weight_name else [SAFETENSORS_NAME, PT_NAME]))
    path = Path(source)
    if not path.exists():
        raise SLAStateNotFoundError(
            f"there is no file or folder {str(path)!r}, and it is not a repository on the Hub such as 'user/name'"
        )
    if path.is_file():
        return path
    return path / (remote.subfolder or "") / (weight_name or "")


def fit(state: SLAState, expected: Mapping[str, int], config: SLAConfig) -> dict[str, dict[str, torch.Tensor]]:
    """The file's tensors for the layers of a model, every one of them, checked.

    Args:
        expected: Head size by layer, as `self_attention_layers` gives it.

    Raises:
        SLAStateMismatchError: The file is for other layers or head sizes, or lacks a tensor the settings need.
    """
    if state.by_head_dim:
        missing = sorted(set(expected.values()) - set(state.by_head_dim))
        if missing:
            raise SLAStateMismatchError(
                f"the file has projections for head sizes {sorted(state.by_head_dim)}, the model needs {missing[0]}"
            )
        layers: dict[str, Any] = {name: state.by_head_dim[head_dim] for name, head_dim in expected.items()}
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
        if (
            "phi_k.weight" in needed
            and config.tie_feature_map_qk
            and not torch.equal(tensors["phi_q.weight"], tensors["phi_k.weight"])
        ):
            raise SLAStateMismatchError(f"the settings tie phi_q and phi_k, and the file has two of them for {name}")
    usable = needed | {"proj_s.weight"}
    return {name: {key: t for key, t in layers[name].items() if key in usable} for name in expected}


def parse_settings(state: SLAState) -> SLAConfig:
    """The settings in a file.

    Raises:
        SLASettingsConflictError: It holds none, as those of other projects.
        SLAStateFormatError: One of them is unknown or out of range.
    """
    if state.settings is None:
        raise SLASettingsConflictError("the file holds no settings; pass config=SLAConfig(...), or --sla-config")
    try:
        return SLAConfig.parse({"min_length": 0} | state.settings)  # files from before it ran SLA at every length
    except SLAConfigError as error:
        raise SLAStateFormatError(f"the file's settings are wrong: {error}") from error


def merge_settings(state: SLAState, given: SLAConfig | Mapping[str, Any] | str | None) -> tuple[SLAConfig, str]:
    """As `settings_for`, of a state that has been read."""
    if state.settings is None and given is not None:
        return SLAConfig.parse(given), ""
    stored = parse_settings(state)
    wanted = SLAConfig.parse(given, stored)
    here = wanted.to_dict()
    differing = [
        f"{name} is {value!r} in the file and {here[name]!r} here"
        for name, value in stored.to_dict().items()
        if here[name] != value
    ]
    return wanted, "; ".join(differing)


def _renamed(layers: dict[str, Any], expected: Mapping[str, int]) -> dict[str, Any]:
    """A bare model is called "transformer" or "unet", whatever component of a pipeline it was saved as."""
    ours, theirs = ({name.partition(".")[0] for name in names} for names in (expected, layers))
    if len(ours) == len(theirs) == 1 and ours != theirs:
        return {f"{min(ours)}.{name.partition('.')[2]}": tensors for name, tensors in layers.items()}
    return layers


def _provenance(model_or_pipe: Any) -> dict[str, Any]:
    models = {name: type(model).__name__.removeprefix("FSDP") for name, model in denoisers(model_or_pipe).items()}
    versions = {name: version(name).split("+")[0] for name in ("torch", "diffusers")}
    meta: dict[str, Any] = {"models": models, "versions": versions}
    named = str(getattr(getattr(model_or_pipe, "config", None), "_name_or_path", "") or "")
    if is_repo_id(named):  # a local path says nothing to others, and something about its owner
        meta["base_model"] = named
    return meta


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter on CPU, gathered from every process where FSDP2 has cut it up."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().cpu().clone()


def _copy(tensor: torch.Tensor, parameter: Any) -> None:
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)
