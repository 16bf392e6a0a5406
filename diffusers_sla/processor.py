"""SLAAttnProcessor: what a user sets on a model, and what sits on each layer afterwards."""

import collections
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .config import SLAConfig
from .errors import SLAUnsupportedError
from .kernel import sla_attention
from .rewrite import rewritten

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("proj_l_weight", "proj_l_bias", "proj_s_weight", "phi_q_weight", "phi_k_weight")


class SLAAttnProcessor:
    """Settings to set on a model: `pipe.unet.set_attn_processor(SLAAttnProcessor(topk=0.15))`.

    The setter binds one processor per self-attention layer, each with its own projection; cross-attention keeps its
    native processor. Bound processors are `SLAAttnProcessor`s too.

    Args:
        config: SLAConfig, mapping, or JSON string of settings; or pass the settings themselves as keywords.
        strict: Raise SLAUnsupportedError for a call that SLA cannot serve. False runs it dense, counts it with its
            reason for `sla_report`, and logs the first of each kind. None: True while the layer is in training mode.

    Raises:
        SLAConfigError: A setting is unknown or out of range.
    """

    def __init__(
        self, config: SLAConfig | Mapping[str, Any] | str | None = None, *, strict: bool | None = None, **settings: Any
    ):
        base = SLAConfig.parse(config)
        self.config = SLAConfig.parse(base.to_dict() | settings) if settings else base
        self.strict = strict

    def __call__(self, attn, *args, **kwargs):
        raise SLAUnsupportedError(
            "this SLAAttnProcessor belongs to no layer yet; install it with model.set_attn_processor(...) "
            "or apply_sla(model)"
        )


class SLALayer(nn.Module):
    """The weights of one layer: bare float32 parameters, whatever dtype the model is cast to.

    Names and shapes: proj_l_weight [D, D] and proj_l_bias [D], zero at the start (eq. 6); proj_s_weight [D, D] or
    None, which stands for the identity; phi_q_weight, phi_k_weight [D, D], the learnable maps of
    feature_map="hedgehog" or None, one tensor if they are tied.
    """

    def __init__(self, head_dim: int, config: SLAConfig, device: torch.device | None = None):
        super().__init__()
        self.head_dim = head_dim

        def parameter(tensor):
            return nn.Parameter(tensor.to(device=device, dtype=torch.float32))

        self.proj_l_weight = parameter(torch.zeros(head_dim, head_dim)) if config.linear != "none" else None
        self.proj_l_bias = parameter(torch.zeros(head_dim)) if config.linear != "none" else None
        self.proj_s_weight: nn.Parameter | None = None
        learnable = config.feature_map == "hedgehog" and config.linear != "none"
        self.phi_q_weight = parameter(torch.eye(head_dim)) if learnable else None
        self.phi_k_weight = self.phi_q_weight
        if learnable and not config.tie_feature_map_qk:
            self.phi_k_weight = parameter(torch.eye(head_dim))

    def add_proj_s(self) -> nn.Parameter:
        """Make proj_s, the projection of the sparse branch, an explicit identity and return it."""
        if self.proj_s_weight is None:
            device = next((p.device for p in self.parameters()), None)
            self.proj_s_weight = nn.Parameter(torch.eye(self.head_dim, device=device))
        return self.proj_s_weight

    def forward(self, query: Tensor, key: Tensor, value: Tensor, config: SLAConfig, **keywords: Any) -> Tensor:
        """`sla_attention` with this layer's weights; query, key, value [B, H, L, D]."""
        weights = {name: getattr(self, name) for name in WEIGHTS}
        return sla_attention(query, key, value, **config.kernel_settings(), **weights, **keywords)

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.phi_k_weight is self.phi_q_weight:  # safetensors refuses one tensor under two names
            destination.pop(f"{prefix}phi_k_weight", None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        # A backbone's checkpoint has none of our keys: they live in the state file.
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *args)


class BoundSLAAttnProcessor(SLAAttnProcessor, nn.Module):
    """The processor of one layer. Made by `bind`; its classes also derive from the layer's native processor."""

    native_class: type

    def _setup(self, native: Any, head_dim: int, config: SLAConfig, strict: bool | None, text: str | None, device):
        nn.Module.__init__(self)
        self.__dict__.update(vars(native))
        self.native = native
        self.config = config
        self.strict = strict
        self.text = text  # where the text tokens sit: "first", "last" or None
        self.text_length: int | None = None  # set before the call where the block joins text and image by itself
        self.enabled = True
        self.calls_sla = 0
        self.calls_dense: collections.Counter[str] = collections.Counter()
        self.watch: Callable[..., Tensor] | None = None
        self.state = SLALayer(head_dim, config, device)
        return self

    def attend_blhd(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        attention_kwargs=None, *, backend=None, parallel_config=None, context=None,
    ):  # fmt: skip
        """Stands in for `dispatch_attention_fn`: [B, L, H, D]."""

        def dense():
            return dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            ).transpose(1, 2)  # fmt: skip

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        reason = None if parallel_config is None else "context parallelism is on"
        return self._attend(q, k, v, attn_mask, dropout_p, is_causal, scale, context, dense, reason).transpose(1, 2)

    def attend_bhld(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
        context=None,
    ):  # fmt: skip
        """Stands in for `F.scaled_dot_product_attention`: [B, H, L, D]."""

        def dense():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return self._attend(query, key, value, attn_mask, dropout_p, is_causal, scale, context, dense, None)

    def _attend(self, query, key, value, mask, dropout_p, is_causal, scale, context, dense, reason):
        key_mask = None
        if mask is not None and reason is None:
            key_mask, reason = _key_mask(mask, query, key)
        keep = self._kept_tokens(context)
        if reason is None:
            reason = self._refusal(query, key, dropout_p, is_causal, keep)
        if not self.enabled:
            reason = "disabled"
        if reason is None:

            def run():
                return self.state(
                    query, key, value, self.config, scale=scale, key_mask=key_mask, keep_q=keep, keep_k=keep
                )

        else:
            self._refuse(reason)
            run = dense
        if not torch.compiler.is_compiling():
            if reason is None:
                self.calls_sla += 1
            else:
                self.calls_dense[reason] += 1
        if self.watch is None:
            return run()
        return self.watch(self, query, key, value, key_mask, keep, run)

    def _kept_tokens(self, context):
        if self.text is None:
            return (0, 0)
        length = self.text_length if context is None else context.shape[1]
        return (length or 0, 0) if self.text == "first" else (0, length or 0)

    def _refusal(self, query, key, dropout_p, is_causal, keep) -> str | None:
        if is_causal:
            return "the call is causal"
        if dropout_p:
            return f"attention dropout is {dropout_p}"
        if query.shape[2] != key.shape[2]:
            return f"queries and keys differ in number: {query.shape[2]} and {key.shape[2]}"
        if query.shape[-1] != self.state.head_dim:
            return f"the head size is {query.shape[-1]}, the layer was set up for {self.state.head_dim}"
        if query.dtype not in DTYPES:
            return f"dtype {query.dtype} is not one of {', '.join(map(str, DTYPES))}"
        if sum(keep) >= query.shape[2]:
            return "there are only text tokens"
        return None

    def _refuse(self, reason: str) -> None:
        if reason == "disabled":
            return
        if self.training if self.strict is None else self.strict:
            raise SLAUnsupportedError(
                f"SLA cannot serve a call of {self.native_class.__name__}: {reason}. "
                "With strict=False such calls run dense and show in sla_report()."
            )
        if not torch.compiler.is_compiling() and not self.calls_dense[reason]:
            logger.warning("%s runs dense: %s", self.native_class.__name__, reason)

    def __reduce_ex__(self, protocol):
        return _empty, (self.native_class,), {**self.__dict__, "watch": None}


def _empty(native_class: type) -> BoundSLAAttnProcessor:
    made: Any = rewritten(native_class, BoundSLAAttnProcessor)
    return made.__new__(made)


def bind(
    native: Any,
    head_dim: int,
    config: SLAConfig,
    *,
    strict: bool | None,
    text: str | None,
    device: torch.device | None,
) -> BoundSLAAttnProcessor:
    """The processor of one layer, in place of `native`.

    Raises:
        SLAUnsupportedError: The native processor makes no attention call, or has weights of its own.
    """
    if isinstance(native, nn.Module):
        raise SLAUnsupportedError(f"{type(native).__name__} has weights of its own (IP-Adapter, for example)")
    return _empty(type(native))._setup(native, head_dim, config, strict, text, device)


def _key_mask(mask: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, str | None]:
    """[B, Lk] bool of a mask that hides the same keys from every query, or the reason why it is none."""
    B, Lq, Lk = query.shape[0], query.shape[2], key.shape[2]
    if mask.dtype != torch.bool:
        return None, f"the attention mask is {mask.dtype}, not bool"
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != Lk or mask.shape[2] not in (1, Lq):
        return None, f"the attention mask has shape {tuple(mask.shape)}"
    if mask.shape[2] == 1:
        return mask[:, 0, 0].expand(B, Lk), None
    keys = mask.any(2, keepdim=True)  # an outer product of one key mask: what HunyuanVideo 1.5 and Chroma pass
    if not bool((mask == (keys & keys.transpose(2, 3))).all()):
        return None, "the attention mask differs from query to query"
    return keys[:, 0, 0].expand(B, Lk), None
