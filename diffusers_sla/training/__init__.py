"""Training with SLA: checkpoints of any accelerate script, closed-form calibration, and fine-tuning."""

from .checkpoint import backbone_parameters, register_sla_for_checkpointing

__all__ = ["backbone_parameters", "register_sla_for_checkpointing"]
