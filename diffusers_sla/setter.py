"""The only thing this package touches in diffusers: `set_attn_processor` understands an SLAAttnProcessor.

Diffusers' setter gives one object to every layer, cross-attention included; SLA needs one processor per layer.
Pipelines get the same method for all of their denoisers.
"""

import functools
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin

from .apply import apply_sla, denoisers
from .processor import BoundSLAAttnProcessor, SLAAttnProcessor


def _teach(native_setter):
    @functools.wraps(native_setter)
    def set_attn_processor(self, processor):
        if isinstance(processor, SLAAttnProcessor) and not isinstance(processor, BoundSLAAttnProcessor):
            apply_sla(self, processor.config, strict=processor.strict)
        else:
            native_setter(self, processor)

    set_attn_processor.knows_sla = True  # type: ignore[attr-defined]
    return set_attn_processor


def _set_on_pipeline(self: DiffusionPipeline, processor: Any) -> None:
    """Set the attention processor of every denoiser of this pipeline."""
    if isinstance(processor, SLAAttnProcessor):
        apply_sla(self, processor.config, strict=processor.strict)
        return
    for model in denoisers(self).values():
        model.set_attn_processor(processor)


def install() -> None:
    if not hasattr(AttentionMixin.set_attn_processor, "knows_sla"):
        AttentionMixin.set_attn_processor = _teach(AttentionMixin.set_attn_processor)  # type: ignore[method-assign]
    if not hasattr(DiffusionPipeline, "set_attn_processor"):
        DiffusionPipeline.set_attn_processor = _set_on_pipeline  # type: ignore[attr-defined]
