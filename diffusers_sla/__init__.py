"""Sparse-Linear Attention (arXiv:2509.24006) for Hugging Face Diffusers."""

from .apply import apply_sla, record, remove_sla, sla_disabled, sla_layers, sla_parameters, sla_step
from .config import SLAConfig
from .drop_in import SparseLinearAttention
from .errors import (
    SLAConfigError,
    SLADataError,
    SLAError,
    SLAHubError,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateFormatError,
    SLAStateMismatchError,
    SLAStateNotFoundError,
    SLAStateVersionError,
    SLATrainingError,
    SLAUnsupportedError,
)
from .kernel import select_blocks, sla_attention
from .processor import SLAAttnProcessor
from .push import push_sla_to_hub
from .report import sla_report
from .setter import install as _teach_diffusers
from .weights import load_sla_weights, save_sla_weights

__version__ = "0.1.0"

_teach_diffusers()

__all__ = [
    "SLAAttnProcessor",
    "SLAConfig",
    "SLAConfigError",
    "SLADataError",
    "SLAError",
    "SLAHubError",
    "SLASettingsConflictError",
    "SLAStateError",
    "SLAStateFormatError",
    "SLAStateMismatchError",
    "SLAStateNotFoundError",
    "SLAStateVersionError",
    "SLATrainingError",
    "SLAUnsupportedError",
    "SparseLinearAttention",
    "apply_sla",
    "load_sla_weights",
    "push_sla_to_hub",
    "record",
    "remove_sla",
    "save_sla_weights",
    "select_blocks",
    "sla_attention",
    "sla_disabled",
    "sla_layers",
    "sla_parameters",
    "sla_report",
    "sla_step",
]
