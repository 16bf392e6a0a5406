"""SLAConfig: every setting that changes what SLA computes, validated once, here."""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import SLAConfigError

BLOCK_SIZES = (16, 32, 64, 128)
FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")
LINEAR_MODES = ("all", "marginal", "none")
# Tokens. On an H100 SLA was faster from 3072 on, and from 4096 on also where the host was slow
# (benchmarks/gpu_together.json).
MIN_LENGTH = {"cuda": 4096}


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """Settings of Sparse-Linear Attention (arXiv:2509.24006). They travel with every state file.

    Args:
        topk: Share of key blocks each query block attends to exactly, in (0, 1]; at least one block is kept.
        blkq: Queries per block: 16, 32, 64 or 128.
        blkk: Keys per block: 16, 32, 64 or 128.
        feature_map: phi of the linear branch: "softmax" over the head dimension, "elu" (elu + 1), "relu", or the
            learnable "hedgehog" (softmax of [xM, -xM]).
        tie_feature_map_qk: Whether q and k share a learnable phi. Without effect for the fixed ones.
        linear: Keys the linear branch sums over: "all" of them (the released checkpoints), the "marginal" blocks of
            each query block (the paper, eq. 5), or "none" (sparse only).
        skip: Share of key blocks, those of lowest score, that neither branch sees, in [0, 1). Only
            linear="marginal" tells them from the marginal ones.
        dense_layers: Self-attention layers that stay native, by number in the model (negative: from its end) or by
            path, such as [0, 1, -1] or ["blocks.0.attn1"]. A layer that stays native has no projection.
        dense_steps: Denoising steps in which every layer runs dense, by number (negative: from the last), such as
            [0, 1, -1].
        min_length: Calls of fewer queries run dense. None: MIN_LENGTH on a GPU, where short calls are faster dense; on
            other devices, which are for trying things out, every length runs SLA.

    Raises:
        SLAConfigError: A value is out of range; names the setting, the value and what is allowed.
    """

    topk: float = 0.2
    blkq: int = 64
    blkk: int = 64
    feature_map: str = "softmax"
    tie_feature_map_qk: bool = True
    linear: str = "all"
    skip: float = 0.0
    dense_layers: tuple[int | str, ...] = ()
    dense_steps: tuple[int, ...] = ()
    min_length: int | None = None

    def __post_init__(self):
        _check_number("topk", self.topk, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _check_number("skip", self.skip, lambda x: 0 <= x < 1, "a number in [0, 1)")
        _check_choice("blkq", self.blkq, BLOCK_SIZES)
        _check_choice("blkk", self.blkk, BLOCK_SIZES)
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _check_choice("linear", self.linear, LINEAR_MODES)
        if not isinstance(self.tie_feature_map_qk, bool):
            raise SLAConfigError(f"tie_feature_map_qk must be true or false, got {self.tie_feature_map_qk!r}")
        for name, kinds, what in (("dense_layers", int | str, "numbers or paths"), ("dense_steps", int, "numbers")):
            object.__setattr__(self, name, _listed(name, getattr(self, name), kinds, what))  # hashable, in any case
        if self.min_length is not None:
            _check_number("min_length", self.min_length, lambda x: isinstance(x, int) and x >= 0, "an integer >= 0")
        if self.topk + self.skip > 1:
            raise SLAConfigError(f"topk + skip must not exceed 1, got {self.topk} + {self.skip}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of every setting, as written into state files."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def kernel_settings(self) -> dict[str, Any]:
        """The settings that `sla_attention` takes, by its names."""
        names = ("topk", "blkq", "blkk", "feature_map", "linear", "skip")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def parse(
        cls, settings: "SLAConfig | Mapping[str, Any] | str | None", base: "SLAConfig | None" = None
    ) -> "SLAConfig":
        """SLAConfig from one, a mapping, or a JSON or Python-dict string such as '{"topk": 0.15, "blkq": 32}'.

        Args:
            base: Has the settings that are not named; the defaults when None.

        Raises:
            SLAConfigError: The string is neither, a key is unknown, or a value is out of range.
        """
        base = base or cls()
        if settings is None:
            return base
        if isinstance(settings, cls):
            return settings
        if isinstance(settings, str):
            settings = _parse_dict(settings)
        if not isinstance(settings, Mapping):
            raise SLAConfigError(f"SLA settings must be a dict or a JSON object, got {type(settings).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise SLAConfigError(f"unknown SLA setting {unknown[0]!r}; known are {', '.join(known)}")
        return replace(base, **settings)


def _parse_dict(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as json_error:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise SLAConfigError(
                f"sla_config is neither JSON nor a Python dict: {text!r} ({json_error}); "
                """an example: '{"topk": 0.15, "blkq": 32}'"""
            ) from json_error


def _listed(name, value, kinds, what):
    if not isinstance(value, list | tuple) or any(isinstance(x, bool) or not isinstance(x, kinds) for x in value):
        raise SLAConfigError(f"{name} must be a list of {what}, got {value!r}")
    return tuple(value)


def _check_number(name, value, allowed, what):
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):
        raise SLAConfigError(f"{name} must be {what}, got {value!r}")


def _check_choice(name, value, choices):
    kind = str if isinstance(choices[0], str) else int
    if not isinstance(value, kind) or isinstance(value, bool) or value not in choices:  # 64.0 == 64
        raise SLAConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
