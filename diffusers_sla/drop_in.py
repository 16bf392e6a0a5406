"""SparseLinearAttention: the module of the reference implementation (thu-ml/SLA), for code written to it."""

import torch
from torch import Tensor, nn

from .config import SLAConfig
from .errors import SLAConfigError, SLAUnsupportedError
from .kernel import sla_attention
from .kernel.api import MAX_HEAD_DIM


class SparseLinearAttention(nn.Module):
    """Drop-in for `sparse_linear_attention.SparseLinearAttention`; switch by the import line.

    `state_dict` has `proj_l.weight` [D, D] and `proj_l.bias` [D], float32, zero at the start. Unlike the reference it
    keeps at least one block however small topk is, and serves any device, head size up to 256 and block size.

    Args:
        head_dim: D.
        topk: Share of key blocks each query block attends to exactly, in (0, 1].
        feature_map: "softmax", "elu" or "relu".
        BLKQ, BLKK: Queries and keys per block: 16, 32, 64 or 128.
        use_bf16: Compute in bfloat16; False: in float16.
        tie_feature_map_qk: Without effect, as all of these feature maps are fixed.

    Raises:
        SLAConfigError: A setting is out of range.
        SLAUnsupportedError: feature_map is "hedgehog", which has weights that the reference's state has no names for.
    """

    def __init__(
        self, head_dim: int, topk: float, feature_map: str = "softmax", BLKQ: int = 64, BLKK: int = 64,
        use_bf16: bool = True, tie_feature_map_qk: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.config = SLAConfig(
            topk=topk, blkq=BLKQ, blkk=BLKK, feature_map=feature_map, tie_feature_map_qk=tie_feature_map_qk
        )
        if feature_map == "hedgehog":
            raise SLAUnsupportedError(
                "feature_map 'hedgehog' has weights of its own: use SLAAttnProcessor or apply_sla"
            )
        if type(head_dim) is not int or not 0 < head_dim <= MAX_HEAD_DIM:
            raise SLAConfigError(f"head_dim must be an int from 1 to {MAX_HEAD_DIM}, got {head_dim!r}")
        if not isinstance(use_bf16, bool):
            raise SLAConfigError(f"use_bf16 must be True or False, got {use_bf16!r}")
        self.dtype = torch.bfloat16 if use_bf16 else torch.float16
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, return_sparsity: bool = False) -> Tensor | tuple[Tensor, float]:
        """Attention over q [B, H, Lq, D], k and v [B, H, Lk, D].

        Returns:
            [B, H, Lq, D] in q's dtype; with `return_sparsity` also the share of key blocks kept.

        Raises:
            ValueError, TypeError: q, k or v is no float tensor of these shapes; the message names it.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name} must be a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
            if x.ndim != 4 or x.shape[-1] != self.proj_l.in_features:
                expected = f"[B, H, L, {self.proj_l.in_features}]"
                raise ValueError(f"{name} must be {expected}, the last being head_dim, got shape {tuple(x.shape)}")
        # Any strides, as the reference takes them.
        inputs = (x.to(self.dtype) if x.stride(-1) == 1 else x.to(self.dtype).contiguous() for x in (q, k, v))
        o = sla_attention(
            *inputs, **self.config.kernel_settings(),
            proj_l_weight=self.proj_l.weight, proj_l_bias=self.proj_l.bias,
        ).to(q.dtype)  # fmt: skip
        if not return_sparsity:
            return o
        num_blocks = -(-k.shape[2] // self.config.blkk)
        return o, max(1, int(self.config.topk * num_blocks)) / num_blocks
