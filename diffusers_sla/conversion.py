"""State files from one layout into another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .config import SLAConfig
from .errors import SLASettingsConflictError, SLAStateError
from .foreign import LAYOUTS, layout_of, to_foreign
from .hub import Remote, download_configs, is_repo_id
from .saved_models import component_configs, expected_layers
from .state import PT_NAME, SAFETENSORS_NAME, SLAState, find_state, read_state, replace, write_state
from .tensor_files import load_pt, open_safetensors
from .wan_checkpoint import convert_wan_checkpoint, is_wan_checkpoint
from .weights import fit, merge_settings

OURS, SIMPLETUNER = "diffusers-sla", "simpletuner"
NAMES = (OURS, SIMPLETUNER, *LAYOUTS)


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: str = OURS,
    config: SLAConfig | Mapping[str, Any] | str | None = None,
    model: str | os.PathLike | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
) -> list[Path]:
    """Write a state file in another layout or format; returns what was written.

    Args:
        source: A file or folder that `read_state` reads.
        out: A .pt, .pth or .safetensors file, or a folder. A folder gets both of ours and, if `source` is a whole Wan
            checkpoint, its transformer in diffusers' layout under "transformer".
        layout: "diffusers-sla", "simpletuner" (version 1), "turbodiffusion", "sglang" or "fastvideo".
        config: Settings for a source that holds none; default: what its project runs with.
        model: A pipeline or model, folder or repository, of which only the configs are read: it gives the layers that
            a version 1 file does not name.
        base_model: Repository to record as the one this was trained from.

    Raises:
        SLAStateError: The source is wrong, or the layout has no place for what it holds.
        SLASettingsConflictError: `config` contradicts the settings in the source.
        SLAHubError: `model` cannot be had.
    """
    if layout not in NAMES:
        raise SLAStateError(f"layout must be one of {', '.join(NAMES)}, got {layout!r}")
    path, out = find_state(source), Path(out)
    state = read_state(path)
    state.settings = _settings(path, state, config)
    if base_model:
        state.meta["base_model"] = base_model
    if state.by_head_dim and layout != SIMPLETUNER:
        _name_layers(state, model, token)
    if out.suffix not in (".pt", ".pth", ".safetensors"):
        return _to_folder(path, state, out, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    if layout in LAYOUTS:
        tensors = to_foreign(state.layers, layout)
        save = save_file if out.suffix == ".safetensors" else _save_pt
        replace(out, lambda temporary: save(tensors, temporary))
    else:
        write_state(state, out, version=1 if layout == SIMPLETUNER else 2)
    return [out]


def _to_folder(path: Path, state: SLAState, out: Path, layout: str) -> list[Path]:
    if layout != OURS:
        raise SLAStateError(f"a state in {layout}'s layout is one file; name it, such as {out / 'sla.safetensors'}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if is_wan_checkpoint(_names(path)):
        written.append(convert_wan_checkpoint(path, out / "transformer"))
    for name in (PT_NAME, SAFETENSORS_NAME):
        write_state(state, out / name)
        written.append(out / name)
    return written


def _settings(path: Path, state: SLAState, config: Any) -> dict[str, Any]:
    if state.settings is None:
        known = SLAConfig.parse(LAYOUTS[layout_of(_names(path)) or "turbodiffusion"].settings)
        return SLAConfig.parse(config, known).to_dict()
    chosen, differing = merge_settings(state, config)
    if differing:
        raise SLASettingsConflictError(f"{path}: {differing}")
    return chosen.to_dict()


def _name_layers(state: SLAState, model: str | os.PathLike | None, token: str | bool | None) -> None:
    if model is None:
        raise SLAStateError("a version 1 file does not name its layers; give the model it is for (--model)")
    folder = download_configs(Remote(str(model), token=token)) if is_repo_id(model) else Path(model)
    config = SLAConfig.parse(state.settings)
    expected = expected_layers(component_configs(folder), config)
    if not expected:
        raise SLAStateError(f"{model} is not a pipeline or model with layers that SLA knows")
    state.layers = fit(state, expected, config)
    state.by_head_dim = {}
    state.meta.pop("version", None)


def _names(path: Path) -> Mapping[Any, Any]:
    """A checkpoint's keys; its tensors stay on disk."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as (_, tensors):
            return dict.fromkeys(tensors)
    return load_pt(path)


def _save_pt(tensors: dict[str, torch.Tensor], path: str) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
