import pytest
import torch
import torch.nn.functional as F
from cases import Case, check

from diffusers_sla.kernel import sla_attention

CASES = [
    Case(),
    Case(dtype=torch.bfloat16, blhd=True),
    Case(dtype=torch.float16, linear="marginal", skip=0.2, feature_map="elu"),
    Case(linear="none", Lq=33, Lk=70, blkq=32),
    Case(H=4, Hkv=2, feature_map="relu", linear="marginal", Lk=75),
    Case(feature_map="hedgehog", mask=True, D=24),
    Case(feature_map="hedgehog", tied=False, linear="marginal", proj_s=True, blkk=32),
    Case(keep_q=(7, 0), keep_k=(5, 9), mask=True, B=2, proj_s=True),
    Case(keep_q=(0, 20), keep_k=(0, 20), linear="marginal", skip=0.3, blhd=True, Hkv=1),
    Case(D=72, scale=0.3, blkq=64, blkk=32, Lq=130, Lk=97),
    Case(topk=1.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_match_the_definition(case):
    check(case, "eager", "cpu")


def test_every_block_and_no_projection_is_dense_attention():
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    o = sla_attention(q, k, v, topk=1.0, blkq=32, blkk=32, linear="none", impl="eager")
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))


def test_gradients_may_be_asked_for_with_their_graph():
    q, k, v = (torch.randn(1, 1, 32, 16).requires_grad_() for _ in range(3))
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl="eager")
    (dq,) = torch.autograd.grad(o.sum(), q, retain_graph=True)
    assert torch.equal(torch.autograd.grad(o.sum(), q, create_graph=True)[0], dq)


def test_nan_in_a_query_stays_in_its_row():
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    q[0, 0, 5] = float("nan")
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl="eager")
    assert o[0, 0, 5].isnan().all()
    assert o[0, 0, 16:].isfinite().all()


def test_an_all_hidden_sequence_gives_zero_not_nan():
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    mask = torch.zeros(1, 32, dtype=torch.bool)
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, key_mask=mask, proj_l_weight=torch.eye(16), impl="eager")
    assert torch.equal(o, torch.zeros_like(o))


def test_autocast_casts_the_inputs_like_dense_attention():
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, proj_l_weight=torch.eye(16), impl="eager")
    half = (x.bfloat16() for x in (q, k, v))
    expected = sla_attention(*half, topk=0.5, blkq=16, blkk=16, proj_l_weight=torch.eye(16), impl="eager")
    assert o.dtype is torch.bfloat16
    assert torch.equal(o, expected)


def test_one_token():
    q, k, v = (torch.randn(1, 2, 1, 16, dtype=torch.float64) for _ in range(3))
    results = []
    for impl, dtype in (("eager", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o = sla_attention(*leaves, proj_l_weight=torch.eye(16), proj_l_bias=torch.ones(16), impl=impl)
        o.sum().backward()
        results.append([o.detach().double(), *(x.grad.double() for x in leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_of_equal_blocks_the_first_is_the_one_that_is_kept(linear):
    torch.manual_seed(0)
    q, v, weight = torch.ones(1, 2, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(16, 16)
    settings = {"topk": 0.25, "blkq": 16, "blkk": 16, "linear": linear, "proj_l_weight": weight}
    got, want = (sla_attention(q, q, v, **settings, impl=impl) for impl in ("eager", "reference"))
    torch.testing.assert_close(got, want)
    other = sla_attention(q, q, v.roll(16, 2), **settings, impl="eager")
    assert not torch.allclose(other, got, atol=0.1)
