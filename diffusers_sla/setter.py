"""The only thing this package touches in diffusers: what sets attention processors knows of SLA.

Diffusers' `set_attn_processor` gives one object to every layer, cross-attention included; SLA needs one processor per
layer. Pipelines get the same method for all of their denoisers. A layer's own `set_processor` refuses to drop SLA, and
the switches that say how dense attention is computed (slicing, xformers, ...) leave a layer that runs SLA as it is.
"""

import functools
import logging
from contextvars import ContextVar
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from .apply import apply_sla, denoisers, keep_weights, set_processor
from .denoising import install as install_denoising
from .denoising import remove
from .errors import SLAUnsupportedError
from .processor import Again, BoundSLAAttnProcessor, SLAAttnProcessor, bind

logger = logging.getLogger(__name__)

SWITCHES = (
    "set_attention_slice",
    "set_use_memory_efficient_attention_xformers",
    "set_use_npu_flash_attention",
    "set_use_xla_flash_attention",
)
# Whether `set_attn_processor` of a whole model is at work: it puts SLA back itself.
_whole_model: ContextVar[bool] = ContextVar("whole_model", default=False)


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
        token = _whole_model.set(True)
        try:
            native_setter(self, processor)
        finally:
            _whole_model.reset(token)
        _put_back(self, before)

    set_attn_processor.knows_sla = True  # type: ignore[attr-defined]
    return set_attn_processor


def _put_back(model: nn.Module, before: dict[str, BoundSLAAttnProcessor]) -> None:
    """SLA stays where Diffusers changed the processor for a reason of its own, an IP-Adapter or fused projections that
    came or went. Any other processor was set in SLA's place. Layers that get their SLA processors back after a while,
    as pipelines do that borrow the layers for a run, are told of each forward again."""
    lost = 0
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
        else:
            lost += 1
    if lost:
        logger.warning(
            "set_attn_processor took SLA and its projections out of %d attention layers of %s; apply_sla puts SLA "
            "back, load_sla_weights projections that were saved",
            lost, type(model).__name__,
        )  # fmt: skip
    now = [m for m in model.modules() if isinstance(m, BoundSLAAttnProcessor)]
    if before and not now:
        remove(model)
    if now and not before:
        install_denoising(model, now[0].denoising)


def _is_variant(processor: Any) -> bool:
    return isinstance(processor, nn.Module) or type(processor).__name__.startswith("Fused")


def _refuse_to_lose(native_setter):
    @functools.wraps(native_setter)
    def set_processor(self, processor):
        if _runs_sla(self) and not isinstance(processor, BoundSLAAttnProcessor) and not _whole_model.get():
            raise SLAUnsupportedError(
                f"{type(processor).__name__} would replace SLA and its projections on this layer; call "
                "remove_sla(model) first. To keep single layers native, name them in dense_layers"
            )
        native_setter(self, processor)

    return set_processor


def _spare_sla(switch):
    @functools.wraps(switch)
    def spare_sla(self, *args, **kwargs):
        if not _runs_sla(self):
            switch(self, *args, **kwargs)

    return spare_sla


def _runs_sla(attn: Any) -> bool:
    return isinstance(getattr(attn, "processor", None), BoundSLAAttnProcessor)


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
        for kind in (Attention, AttentionModuleMixin):
            kind.set_processor = _refuse_to_lose(kind.set_processor)  # type: ignore[method-assign]
        for name in SWITCHES:  # those of AttentionModuleMixin set a backend for dense calls, not a processor
            setattr(Attention, name, _spare_sla(getattr(Attention, name)))
    if not hasattr(DiffusionPipeline, "set_attn_processor"):
        DiffusionPipeline.set_attn_processor = _set_on_pipeline  # type: ignore[attr-defined]
