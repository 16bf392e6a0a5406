"""Sparse-Linear Attention (arXiv:2509.24006) for Hugging Face Diffusers."""

from .config import SLAConfig
from .errors import (
    SLAConfigError,
    SLAError,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateFormatError,
    SLAStateMismatchError,
    SLAStateNotFoundError,
    SLAStateVersionError,
    SLAUnsupportedError,
)
from .kernel import select_blocks, sla_attention

__version__ = "0.1.0"

__all__ = [
    "SLAConfig",
    "SLAConfigError",
    "SLAError",
    "SLASettingsConflictError",
    "SLAStateError",
    "SLAStateFormatError",
    "SLAStateMismatchError",
    "SLAStateNotFoundError",
    "SLAStateVersionError",
    "SLAUnsupportedError",
    "select_blocks",
    "sla_attention",
]
