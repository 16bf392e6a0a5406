"""One configuration of the op, its inputs, and its comparison with the definition in float64."""

from dataclasses import dataclass

import torch
from closeness import assert_no_worse_than_eager

from diffusers_sla.kernel import select_blocks, sla_attention

WEIGHTS = ("proj_l_weight", "proj_l_bias", "proj_s_weight", "phi_q_weight", "phi_k_weight")


@dataclass(frozen=True)
class Case:
    B: int = 1
    H: int = 2
    Hkv: int = 2
    Lq: int = 80
    Lk: int = 80
    D: int = 16
    dtype: torch.dtype = torch.float32
    topk: float = 0.3
    blkq: int = 16
    blkk: int = 16
    feature_map: str = "softmax"
    tied: bool = True
    linear: str = "all"
    skip: float = 0.0
    scale: float | None = None
    mask: bool = False
    keep_q: tuple[int, int] = (0, 0)
    keep_k: tuple[int, int] = (0, 0)
    proj_s: bool = False
    blhd: bool = False
    size: float = 1.0

    def settings(self):
        names = ("topk", "blkq", "blkk", "skip", "scale", "keep_q", "keep_k")
        return {name: getattr(self, name) for name in names}

    def tensors(self, device, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        def tokens(heads, length):
            shape = (self.B, length, heads, self.D) if self.blhd else (self.B, heads, length, self.D)
            x = (normal(*shape) * self.size).to(device, self.dtype)
            return x.transpose(1, 2) if self.blhd else x

        inputs = {"q": tokens(self.H, self.Lq), "k": tokens(self.Hkv, self.Lk), "v": tokens(self.Hkv, self.Lk)}
        D = self.D
        weights = {"proj_l_weight": normal(D, D) * 0.3, "proj_l_bias": normal(D) * 0.3}
        if self.linear == "none":
            weights = {}
        if self.proj_s:
            weights["proj_s_weight"] = torch.eye(D) + normal(D, D) * 0.3
        if self.feature_map == "hedgehog" and self.linear != "none":
            weights["phi_q_weight"] = normal(D, D) * 0.3
            weights["phi_k_weight"] = weights["phi_q_weight"] if self.tied else normal(D, D) * 0.3
        weights = {name: weight.to(device) for name, weight in weights.items()}
        key_mask = (torch.rand(self.B, self.Lk, generator=generator) > 0.3).to(device) if self.mask else None
        do = normal(self.B, self.H, self.Lq, self.D).to(device, self.dtype)
        return inputs, weights, key_mask, do


def run(case, impl, inputs, weights, key_mask, do, block_map, dtype, weight_dtype=torch.float32):
    """Output and all gradients by name."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    unique = {id(w): w.detach().to(weight_dtype).requires_grad_() for w in weights.values()}
    given = {name: unique[id(w)] for name, w in weights.items()}
    o = sla_attention(
        *leaves.values(), **case.settings(), feature_map=case.feature_map, linear=case.linear, **given,
        key_mask=key_mask, block_map=block_map, impl=impl,
    )  # fmt: skip
    o.backward(do.to(dtype))
    return {"o": o.detach(), **{f"d{name}": x.grad for name, x in (leaves | given).items()}}


def check(case, impl, device):
    """Outputs and gradients of `impl` against the definition in float64, over the same blocks."""
    inputs, weights, key_mask, do = case.tensors(device)
    block_map = select_blocks(inputs["q"], inputs["k"], **case.settings(), key_mask=key_mask, impl=impl)
    exact_map = select_blocks(
        inputs["q"].double(), inputs["k"].double(), **case.settings(), key_mask=key_mask, impl="reference"
    )
    assert (block_map != exact_map).float().mean() <= (0 if case.dtype is torch.float32 else 0.05), "block map"
    actual = run(case, impl, inputs, weights, key_mask, do, None, case.dtype)
    plain = run(case, "reference", inputs, weights, key_mask, do, block_map, case.dtype)
    exact = run(case, "reference", inputs, weights, key_mask, do, block_map, torch.float64, torch.float64)
    for name in exact:
        if name == "dphi_k_weight" and case.tied:
            continue  # the same tensor as dphi_q_weight
        assert_no_worse_than_eager(name, actual[name], plain[name], exact[name])
    assert actual["o"].stride() == inputs["q"].stride()
