"""Training with SLA: checkpoints of any accelerate script, closed-form calibration, and fine-tuning."""

from .calibration import CalibrationReport, calibrate
from .checkpoint import backbone_parameters, register_sla_for_checkpointing
from .fold import fold_proj_s

__all__ = [
    "CalibrationReport",
    "backbone_parameters",
    "calibrate",
    "fold_proj_s",
    "register_sla_for_checkpointing",
]
