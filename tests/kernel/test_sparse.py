"""The kernels, under Triton's interpreter on CPU or on a GPU."""

import gpu_rounding
import pytest
import torch
from cases import Case, check
from torch.utils.checkpoint import checkpoint

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
    for got, expected in zip(*gradients, strict=True):
        assert got.isfinite().all()
        if size == 12:  # phi(k) and H of the 24th are below float16's smallest number
            assert (got - expected).abs().max() <= 0.02 * expected.abs().max() + 0.01


@pytest.mark.parametrize("linear", ["all", "marginal"])
@pytest.mark.parametrize(("size", "Lq", "Lk"), [(1.0, 512, 512), (1000.0, 1024, 128), (1500.0, 512, 512)])
def test_float16_holds_the_gradients_of_a_scaled_loss(linear, size, Lq, Lk, device):
    """Sums over queries that share a feature leave float16 long before the gradients do."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, L, 64, device=device) for L in (Lq, Lk, Lk))
    q[..., 3] += 6
    half = [x.half() for x in (q, k * 0.3, v * 0.1)]
    do = (torch.randn(q.shape, device=device).abs() * size).half()
    gradients = []
    for impl, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [*(x.to(dtype) for x in half), torch.eye(64, device=device)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        o = sla_attention(*leaves[:3], topk=0.1, blkq=128, linear=linear, proj_l_weight=leaves[3], impl=impl)
        gradients.append(torch.autograd.grad(o, leaves, do.to(dtype)))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_float16_does_not_hide_a_loss_that_is_infinite(device):
    q, k, v = (torch.randn(1, 1, 64, 16, device=device).half().requires_grad_() for _ in range(3))
    weight = torch.eye(16, device=device).requires_grad_()
    do = torch.ones_like(q)
    do[0, 0, 3, 5] = float("inf")
    for linear in ("all", "marginal"):
        o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear=linear, proj_l_weight=weight, impl="triton")
        assert not any(x.isfinite().all() for x in torch.autograd.grad(o, (q, k, v, weight), do))


@pytest.mark.parametrize("linear", ["all", "marginal"])
@pytest.mark.parametrize("proj_s", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_saved_may_come_back_with_other_strides(linear, proj_s, checkpointed, device):
    """As save_on_cpu(pin_memory=True) gives it back: contiguous."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 96, 4, 16, device=device).half().transpose(1, 2).requires_grad_() for _ in range(3)]
    leaves.append(torch.randn(16, 16, device=device, requires_grad=True))
    if proj_s:
        leaves.append(torch.randn(16, 16, device=device, requires_grad=True))

    def call(q, k, v, w, a=None):
        settings = {"topk": 0.4, "blkq": 16, "blkk": 16, "linear": linear}
        return sla_attention(q, k, v, **settings, proj_l_weight=w, proj_s_weight=a, impl="triton")

    do = torch.randn_like(leaves[0])
    plain = torch.autograd.grad(call(*leaves), leaves, do)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        o = checkpoint(call, *leaves, use_reentrant=False) if checkpointed else call(*leaves)
        hooked = torch.autograd.grad(o, leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))


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
