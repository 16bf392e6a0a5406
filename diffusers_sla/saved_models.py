"""What a saved pipeline or model is, read off its configs; no weights are loaded."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from .apply import self_attention_layers
from .config import SLAConfig
from .errors import SLAUnsupportedError
from .families import is_known

_PART = r"[A-Za-z]\w*"  # names in files never become paths outside of their folder


def component_configs(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Config by component of a folder: the parts of a pipeline, or the one model in it as "".

    Raises:
        SLAUnsupportedError: A config is not JSON.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return {"": _read(folder / "config.json")}
    configs = {name: folder / name / "config.json" for name in component_names(folder)}
    return {name: _read(path) for name, path in configs.items() if path.is_file()}


def component_names(folder: str | os.PathLike) -> list[str]:
    """The folders of a pipeline's parts, or those a lone model would be in.

    Raises:
        SLAUnsupportedError: model_index.json is not JSON.
    """
    folder = Path(folder)
    names = ["transformer", "transformer_2", "unet"]
    if (folder / "model_index.json").is_file():
        names = list(_read(folder / "model_index.json"))
    return [name for name in names if re.fullmatch(_PART, name) and (folder / name).is_dir()]


def missing_components(folder: str | os.PathLike) -> list[str]:
    """Parts that model_index.json names and that the folder has not; a part the pipeline does without is [null, null].

    Raises:
        SLAUnsupportedError: model_index.json is not JSON.
    """
    index, there = _read(Path(folder) / "model_index.json"), component_names(folder)
    return [
        name
        for name, value in index.items()
        if re.fullmatch(_PART, name) and isinstance(value, list) and value and value[0] and name not in there
    ]


def expected_layers(configs: Mapping[str, Mapping[str, Any]], settings: SLAConfig) -> dict[str, int]:
    """Head size by layer, as `self_attention_layers` gives it for the loaded models; empty if SLA knows none.

    Raises:
        SLAUnsupportedError: A config that its class does not take.
        SLAConfigError: `dense_layers` names a layer that there is not.
    """
    models = {}
    for component, config in configs.items():
        model_class = getattr(diffusers, str(config.get("_class_name")), None)
        if not isinstance(model_class, type) or not issubclass(model_class, diffusers.ModelMixin):
            continue
        try:
            with torch.device("meta"):
                model = model_class.from_config(dict(config))
        except (TypeError, ValueError, KeyError) as error:
            raise SLAUnsupportedError(f"the config of {component or 'the model'} is wrong: {error}") from error
        if is_known(model):
            models[component] = model
    if not models:
        return {}
    return self_attention_layers(models[""] if "" in models else SimpleNamespace(components=models), settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SLAUnsupportedError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SLAUnsupportedError(f"{path} is not a JSON object")
    return config
