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


@pytest.mark.parametrize(("feature_map", "linear"), [("softmax", "all"), ("hedgehog", "all"), ("softmax", "marginal")])
@pytest.mark.parametrize("size", [12, 24])
def test_float16_stands_queries_whose_features_no_key_has(feature_map, linear, size, device):
    """phi / den of such a query is far beyond float16; what comes of it, times phi of the keys, is not."""
    q, k, v = (torch.zeros(1, 2, 128, 64, dtype=torch.float16, device=device) for _ in range(3))
    q[..., 1], k[..., 0] = size, size
    v += torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v)
    leaves = [x.requires_grad_() for x in (q, k, v, 2 * torch.eye(64, device=device))]
    eye = torch.eye(64, device=device)
    phi = {"phi_q_weight": eye, "phi_k_weight": eye} if feature_map == "hedgehog" else {}
    gradients = []
    for impl in ("triton", "eager"):
        o = sla_attention(
            *leaves[:3], topk=0.25, blkk=32, feature_map=feature_map, linear=linear, proj_l_weight=leaves[3], **phi,
            impl=impl,
        )  # fmt: skip
        gradients.append([o, *torch.autograd.grad(o.sum(), leaves)])
    bound = 0.5 if linear == "marginal" else 0.2  # that keeps sums of blocks in float16, cut off at its end
    for got, expected in zip(*gradients, strict=True):
        assert got.isfinite().all()
        if size == 12:
            assert (got - expected).abs().max() <= bound * expected.abs().max() + 0.01


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_float16_holds_the_gradients_of_a_scaled_loss(linear, device):
    """Or they are infinite: a finite wrong one would be taken."""
    torch.manual_seed(0)
    half = [torch.randn(1, 1, 512, 16, device=device).half() for _ in range(3)]
    settings = {"topk": 0.1, "blkq": 16, "blkk": 16, "linear": linear}
    for size in (1.0, 3000.0, 9000.0):
        gradients = []
        for impl, dtype in (("triton", torch.float16), ("reference", torch.float64)):
            leaves = [*(x.to(dtype) for x in half), torch.eye(16, device=device)]
            leaves = [x.detach().requires_grad_() for x in leaves]
            o = sla_attention(*leaves[:3], **settings, proj_l_weight=leaves[3], impl=impl)
            gradients.append(torch.autograd.grad(o, leaves, torch.full_like(o, size)))
        for got, expected in zip(*gradients, strict=True):
            error = (got - expected).abs().max() / expected.abs().max()
            assert error < 5e-3 or not got.isfinite().all()


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_float16_holds_the_sums_of_features_that_do_not_sum_to_one(feature_map, linear, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 128, 64, device=device) for _ in range(3))
    half = [x.half() for x in (q, k * 100, v + 100)]
    weight = torch.eye(64, device=device)
    settings = {"topk": 0.25, "blkk": 32, "feature_map": feature_map, "linear": linear, "proj_l_weight": weight}
    o = sla_attention(*half, **settings, impl="triton")
    expected = sla_attention(*(x.double() for x in half), **settings, impl="reference")
    torch.testing.assert_close(o.double(), expected, rtol=3e-3, atol=0.1)


def test_two_runs_give_the_same_bits(device):
    q, k, v = (torch.randn(1, 2, 64, 16, device=device, requires_grad=True) for _ in range(3))
    gradients = []
    for _ in range(2):
        o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl="triton")
        gradients.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
