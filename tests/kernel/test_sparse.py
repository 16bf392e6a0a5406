"""The kernels, under Triton's interpreter on CPU or on a GPU."""

import gpu_rounding
import pytest
import torch
from cases import Case, check

from diffusers_sla.kernel import sla_attention

CASES = [
    Case(),
    Case(dtype=torch.float16, blhd=True, Lq=75, Lk=75),
    Case(linear="marginal", skip=0.2, feature_map="elu", dtype=torch.float16),
    Case(linear="none", Lq=33, Lk=70, blkq=32),
    Case(H=4, Hkv=2, feature_map="relu", linear="marginal", Lk=75),
    Case(feature_map="hedgehog", mask=True, D=24),
    Case(feature_map="hedgehog", tied=False, linear="marginal", proj_s=True, blkk=32),
    Case(keep_q=(7, 0), keep_k=(5, 9), mask=True, B=2, proj_s=True),
    Case(keep_q=(0, 20), keep_k=(0, 20), linear="marginal", skip=0.3, blhd=True, Hkv=1),
    Case(D=40, scale=0.3, blkq=64, blkk=32, Lq=130, Lk=97),
    Case(linear="marginal", topk=1.0, dtype=torch.float16),  # rows without a marginal block
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_match_the_definition(case, device):
    check(case, "triton", device)


@pytest.mark.parametrize("case", [CASES[3], CASES[7], CASES[9]], ids=str)
def test_float32_stands_a_gpus_rounding(case, device, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU rounds by itself")
    gpu_rounding.use(monkeypatch)
    check(case, "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("blkq", "blkk"), [(64, 64), (128, 64), (16, 128)])
def test_head_sizes_in_bfloat16(D, blkq, blkk):
    check(Case(Lq=300, Lk=300, D=D, dtype=torch.bfloat16, blkq=blkq, blkk=blkk), "triton", "cuda")


@pytest.mark.parametrize("size", [0.0, 100.0])
def test_equal_and_extreme_scores_stay_finite(size, device):
    q, k, v = (torch.randn(1, 1, 64, 16, device=device) for _ in range(3))
    q, k = ((x * size).requires_grad_() for x in (q, k))
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, proj_l_weight=torch.eye(16, device=device), impl="triton")
    o.sum().backward()
    assert all(x.isfinite().all() for x in (o, q.grad, k.grad))


def test_two_runs_give_the_same_bits(device):
    q, k, v = (torch.randn(1, 2, 64, 16, device=device, requires_grad=True) for _ in range(3))
    gradients = []
    for _ in range(2):
        o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl="triton")
        gradients.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
