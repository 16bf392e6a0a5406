"""The only thing this package touches in diffusers: `set_attn_processor` understands an SLAAttnProcessor.

Diffusers' setter gives one object to every layer, cross-attention included; SLA needs one processor per layer.
Pipelines get the same method for all of their denoisers.
"""

import functools
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin
from torch import nn

from .apply import apply_sla, denoisers, keep_weights, set_processor
from .denoising import remove
from .processor import Again, BoundSLAAttnProcessor, SLAAttnProcessor, bind


def _teach(native_setter):
    @functools.wraps(native_setter)
    def set_attn_processor(self, processor):
        if isinstance(processor, SLAAttnProcessor) and not isinstance(processor, BoundSLAAttnProcessor | Again):
            apply_sla(self, processor.config, strict=processor.strict)
            return
        before = {
            path: module.processor
            for path, module in self.named_modules()
            if isinstance(getattr(module, "processor", None), BoundSLAAttnProcessor)
        }
        if isinstance(processor, dict):
            processor = {
                key: before[key.removesuffix(".processor")] if isinstance(value, Again) else value
                for key, value in processor.items()
            }
        native_setter(self, processor)
        _put_back(self, before)

    set_attn_processor.knows_sla = True  # type: ignore[attr-defined]
    return set_attn_processor


def _put_back(model: nn.Module, before: dict[str, BoundSLAAttnProcessor]) -> None:
    """SLA stays where Diffusers changed the processor for a reason of its own, an IP-Adapter or fused projections that
    came or went. Any other processor was set in SLA's place."""
    for path, bound in before.items():
        attn = model.get_submodule(path)
        new = attn.processor
        if isinstance(new, BoundSLAAttnProcessor):
            if new is not bound:
                keep_weights(bound, new)
        elif _is_variant(new) or _is_variant(bound.native):
            device = next(attn.parameters()).device
            again = bind(
                new, bound.state.head_dim, bound.config, bound.family, bound.denoising,
                strict=bound.strict, device=device,
            )  # fmt: skip
            keep_weights(bound, again)
            again.train(attn.training)
            set_processor(attn, again)
    if before and not any(isinstance(m, BoundSLAAttnProcessor) for m in model.modules()):
        remove(model)


def _is_variant(processor: Any) -> bool:
    return isinstance(processor, nn.Module) or type(processor).__name__.startswith("Fused")


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
