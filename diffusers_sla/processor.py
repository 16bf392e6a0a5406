"""SLAAttnProcessor: what a user sets on a model, and what sits on each layer afterwards."""

import collections
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .config import MIN_LENGTH, SLAConfig
from .denoising import Denoising
from .errors import SLAUnsupportedError
from .families import Family
from .kernel import sla_attention
from .parallel import Ulysses, ulysses
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


class Again(SLAAttnProcessor):
    """In a dict for `set_attn_processor`: the layer keeps the SLA processor that it has."""


class SLALayer(nn.Module):
    """The weights of one layer: bare float32 parameters, whatever dtype the model is cast to.

    Names and shapes: proj_l_weight [D, D] and proj_l_bias [D], zero at the start (eq. 6); proj_s_weight [D, D] or
    None, which stands for the identity; phi_q_weight, phi_k_weight [D, D], the learnable maps of
    feature_map="hedgehog" or None, one tensor if they are tied.
    """

    place: Tensor

    def __init__(self, head_dim: int, config: SLAConfig, device: torch.device | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.frozen_told = False
        # Follows the model from device to device where there is no parameter that does.
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)

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
            self.proj_s_weight = nn.Parameter(torch.eye(self.head_dim, device=self.place.device))
        return self.proj_s_weight

    def forward(self, query: Tensor, key: Tensor, value: Tensor, config: SLAConfig, **keywords: Any) -> Tensor:
        """`sla_attention` with this layer's weights; query, key, value [B, H, L, D]."""
        if self.training and not torch.compiler.is_compiling():
            self._tell_if_frozen()
        weights = {name: getattr(self, name) for name in WEIGHTS}
        return sla_attention(query, key, value, **config.kernel_settings(), **weights, **keywords)

    def _tell_if_frozen(self):
        if self.frozen_told or self.proj_l_weight is None or self.proj_l_weight.requires_grad:
            return
        if torch.is_grad_enabled():
            logger.warning(
                "training with SLA's projections frozen. PEFT's add_adapter freezes every weight that is no adapter; "
                "to train them: for p in sla_parameters(model): p.requires_grad_(True)"
            )
            self.frozen_told = True

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
    native: Any  # the processor in whose place this one stands

    def __new__(cls, *args: Any, **kwargs: Any):
        # When IP-Adapters come and go, Diffusers makes a new processor of each other layer's class.
        return Again()

    def _setup(self, native, head_dim: int, config: SLAConfig, strict: bool | None, family: Family, denoising, device):
        nn.Module.__init__(self)
        if isinstance(native, nn.Module):  # an IP-Adapter's: its weights are this processor's, too
            self.__dict__.update({k: v for k, v in vars(native).items() if k not in self.__dict__})
            self._parameters.update(native._parameters)
            self._modules.update(native._modules)
        else:
            self.__dict__.update(vars(native))
        self.__dict__["native"] = native  # not as a submodule: its weights would be there twice
        self.config = config
        self.strict = strict
        self.family = family
        self.denoising: Denoising = denoising
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

        mask = attn_mask
        if isinstance(mask, Tensor) and mask.shape == (query.shape[0], key.shape[1]):
            mask = mask[:, None, None]
        exchange, reason = ulysses(parallel_config, query.shape[2], key.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(q, k, v, mask, dropout_p, is_causal, scale, context, dense, exchange, reason).transpose(
            1, 2
        )

    def attend_bhld(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
        context=None,
    ):  # fmt: skip
        """Stands in for `F.scaled_dot_product_attention`: [B, H, L, D]."""

        def dense():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return self._attend(query, key, value, attn_mask, dropout_p, is_causal, scale, context, dense)

    def _attend(
        self, query, key, value, mask, dropout_p, is_causal, scale, context, dense,
        exchange: Ulysses | None = None, reason: str | None = None,
    ):  # fmt: skip
        ranks = 1 if exchange is None else exchange.degree
        Lq, Lk = query.shape[2] * ranks, key.shape[2] * ranks
        choice = self._choice(query, Lq, Lk, is_causal)
        keep_q = keep_k = (0, 0)
        key_mask = None
        if choice is None:
            reason = reason or self._refusal(query, dropout_p, is_causal)
            if reason is None:
                keep_q, keep_k, reason = self._kept(Lq, Lk, mask is not None, context, ranks)
            if reason is None and mask is not None:
                row = -1 if self.family.text == "first" else 0
                key_mask, reason = _key_mask(mask, query, key, self.family.mask, row)
            if reason is not None:
                self._refuse(reason)
        reason = choice or reason
        if reason is not None:
            run = dense
        elif exchange is None:
            # A partial, so that a watcher sees that SLA serves this call, and with what.
            run = functools.partial(
                self.state,
                query,
                key,
                value,
                self.config,
                scale=scale,
                key_mask=key_mask,
                keep_q=keep_q,
                keep_k=keep_k,
            )
        else:

            def run():
                text = 0 if self.family.packed else sum(keep_q) // ranks
                side = self.family.text
                q, k, v = (exchange.whole(x, text, side) for x in (query, key, value))
                whole_mask = None if key_mask is None else exchange.mask(key_mask, text, side)
                o = self.state(q, k, v, self.config, scale=scale, key_mask=whole_mask, keep_q=keep_q, keep_k=keep_k)
                return exchange.part(o, text, side)

        if not torch.compiler.is_compiling():
            if reason is None:
                self.calls_sla += 1
            else:
                self.calls_dense[reason] += 1
        if self.watch is None:
            return run()
        return self.watch(self, query, key, value, key_mask, keep_q, run)

    def _choice(self, query, Lq: int, Lk: int, is_causal: bool) -> str | None:
        """Why this call is not meant to run SLA, if so."""
        if not self.enabled:
            return "disabled"
        if self.denoising.dense:
            return "dense_steps"
        limit = MIN_LENGTH.get(query.device.type, 0) if self.config.min_length is None else self.config.min_length
        if Lq < limit:
            return f"fewer than {limit} tokens"
        if is_causal and self.family.causal:
            return "the text attends to itself"
        if Lq != Lk and isinstance(self.native, nn.Module):
            return "cross-attention to an image prompt"
        if _scores_are_skipped():
            return "a guider skips the attention scores"
        return None

    def _refusal(self, query, dropout_p: float, is_causal: bool) -> str | None:
        """Why SLA cannot serve this call, if so."""
        if is_causal:
            return "the call is causal"
        if dropout_p:
            return f"attention dropout is {dropout_p}"
        if query.shape[-1] != self.state.head_dim:
            return f"the head size is {query.shape[-1]}, the layer was set up for {self.state.head_dim}"
        if query.dtype not in DTYPES:
            return f"dtype {query.dtype} is not one of {', '.join(map(str, DTYPES))}"
        return None

    def _kept(self, Lq: int, Lk: int, masked: bool, context, ranks: int):
        """Tokens kept (first, last) of the queries and of the keys, or the reason why that is not known."""
        family = self.family
        side = family.text_if_masked if masked and family.text_if_masked else family.text
        if family.extra_keys:
            if Lk < Lq:
                return (0, 0), (0, 0), f"there are {Lk} keys for {Lq} queries, which should be among them"
            return (0, 0), (Lk - Lq, 0) if side == "first" else (0, Lk - Lq), None
        if Lq != Lk:
            return (0, 0), (0, 0), f"queries and keys differ in number: {Lq} and {Lk}"
        text = 0
        if side is not None:
            if self.denoising.image is not None:
                text = max(0, Lq - self.denoising.image.shape[0])  # a layer may see a part of the image only
            elif context is not None:
                text = context.shape[1] * ranks
            elif family.image_tokens is not None:
                return (0, 0), (0, 0), "the layer was called without its model, which counts the text"
        if text >= Lq:
            return (0, 0), (0, 0), "there are only text tokens"
        keep = (text, 0) if side == "first" else (0, text)
        return keep, keep, None

    def kept_keys(self, query: Tensor, key: Tensor, kept: tuple[int, int]) -> tuple[int, int]:
        """Keys kept (first, last) in a call that keeps `kept` queries: others where the text is among keys only."""
        extra = key.shape[2] - query.shape[2] if self.family.extra_keys else 0
        if not extra:
            return kept
        return (extra, 0) if self.family.text == "first" else (0, extra)

    def _refuse(self, reason: str) -> None:
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
    return object.__new__(made)


def bind(
    native: Any,
    head_dim: int,
    config: SLAConfig,
    family: Family,
    denoising: Denoising,
    *,
    strict: bool | None,
    device: torch.device | None,
) -> BoundSLAAttnProcessor:
    """The processor of one layer, in place of `native`.

    Raises:
        SLAUnsupportedError: The native processor makes no attention call.
    """
    bound = _empty(type(native))._setup(native, head_dim, config, strict, family, denoising, device)
    if type(native) in AttentionProcessorRegistry._registry:  # guiders look up there how to skip a layer
        AttentionProcessorRegistry.register(type(bound), AttentionProcessorRegistry.get(type(native)))
    return bound


def _key_mask(mask: Any, query: Tensor, key: Tensor, kind: str | None, row: int) -> tuple[Tensor | None, str | None]:
    """[B, Lk] bool of a mask that hides the same keys from every image query, or the reason why it is none.

    Only shapes, strides and the family's `kind` are looked at, never the values: the device is not waited for.
    """
    B, Lq, Lk = query.shape[0], query.shape[2], key.shape[2]
    if not isinstance(mask, Tensor):
        return None, f"the attention mask is a {type(mask).__name__}"
    if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, Lq) or mask.shape[3] != Lk:
        return None, f"the attention mask has shape {tuple(mask.shape)}"
    if mask.shape[1] != 1 and mask.stride(1) != 0 and kind is None:
        return None, f"the attention mask of shape {tuple(mask.shape)} may differ from head to head"
    if mask.shape[2] != 1 and mask.stride(2) != 0 and kind is None:
        return None, f"the attention mask of shape {tuple(mask.shape)} may differ from query to query"
    keys = mask[:, 0, row].expand(B, Lk)
    if mask.dtype == torch.bool:
        return keys, None
    if kind is None:
        return None, f"the attention mask is {mask.dtype}, not bool"
    return (keys == 0 if kind == "bias" else keys > 0), None


def _scores_are_skipped() -> bool:
    """Whether one of Diffusers' perturbed guiders is at work: it looks for calls of torch's attention."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)
