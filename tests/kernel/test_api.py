import pytest
import torch
from torch.autograd import forward_ad

from diffusers_sla.kernel import select_blocks, sla_attention, sparse

X = torch.zeros(1, 2, 32, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": X[0]}, ValueError, r"q must have 4 dimensions \[B, H, L, D\], got shape \(2, 32, 16\)"),
        ({"v": X[:, :, :16]}, ValueError, "k and v must have the same shape"),
        ({"k": X.half(), "v": X.half()}, ValueError, "k must be torch.float32 on cpu like q, got torch.float16"),
        ({"k": X[:, :0], "v": X[:, :0]}, ValueError, "must not be empty"),
        ({"topk": 0}, ValueError, r"topk must be in \(0, 1\], got 0"),
        ({"topk": 1.5}, ValueError, r"topk must be in \(0, 1\], got 1.5"),
        ({"topk": float("nan")}, ValueError, r"topk must be in \(0, 1\], got nan"),
        ({"skip": 0.9}, ValueError, "topk \\+ skip must not exceed 1"),
        ({"topk": None}, TypeError, "topk must be a number, got None"),
        ({"scale": "auto"}, TypeError, "scale must be a number, got 'auto'"),
        ({"blkq": 48}, ValueError, "blkq must be one of .*, got 48"),
        ({"blkk": 64.0}, ValueError, "blkk must be one of .*, got 64.0"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of .*, got 'gelu'"),
        ({"linear": "some"}, ValueError, "linear must be one of .*, got 'some'"),
        ({"is_causal": True}, ValueError, "is_causal must be False"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"impl": "cuda"}, ValueError, "impl must be .*, got 'cuda'"),
        ({"proj_l_weight": torch.zeros(8, 8)}, ValueError, r"proj_l_weight must have shape \(16, 16\), got \(8, 8\)"),
        ({"proj_l_weight": torch.eye(16).int()}, TypeError, "proj_l_weight must be .* float dtype, got torch.int32"),
        ({"proj_l_weight": torch.eye(16), "proj_l_bias": 0.0}, TypeError, "proj_l_bias must be a tensor .*, got 0.0"),
        ({"proj_l_bias": torch.zeros(16)}, ValueError, "proj_l_bias needs proj_l_weight"),
        (
            {"proj_l_weight": torch.eye(16), "feature_map": "hedgehog"},
            ValueError,
            "phi_q_weight goes with feature_map 'hedgehog' only: 'hedgehog' was given with none",
        ),
        ({"key_mask": [True] * 32}, TypeError, r"key_mask must be a bool tensor of shape \(1, 32\), got list"),
        ({"key_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, r"key_mask must be bool of shape \(1, 32\)"),
        (
            {"key_mask": torch.ones(1, 32, dtype=torch.bool, device="meta")},
            ValueError,
            "key_mask must be on cpu like q, got meta",
        ),
        (
            {"block_map": torch.zeros(1, 2, 1, 1, dtype=torch.int8, device="meta")},
            ValueError,
            "block_map must be on cpu like q, got meta",
        ),
        ({"keep_q": (16, 16)}, ValueError, "keep_q must be two counts"),
        ({"keep_q": 3}, TypeError, "keep_q must be two ints, got 3"),
        ({"keep_k": (True, False)}, TypeError, r"keep_k must be two ints, got \(True, False\)"),
        ({"block_map": torch.zeros(1, 2, 9, 9, dtype=torch.int8)}, ValueError, "block_map must be int8 of shape"),
        (
            {"block_map": torch.ones(1, 2, 2, 2, dtype=torch.int8), "blkq": 16, "blkk": 16, "topk": 0.5},
            ValueError,
            "block_map must have 1 ones in every row, as topk is 0.5, got 2 to 2",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        sla_attention(**({"q": X, "k": X, "v": X} | change))


def test_a_head_over_256_is_refused():
    x = torch.zeros(1, 1, 16, 257)
    with pytest.raises(ValueError, match="the head size D must be at most 256, got 257"):
        sla_attention(x, x, x)


def test_only_the_definition_takes_float64():
    x = X.double()
    with pytest.raises(TypeError, match=r"q must be one of .*, got torch\.float64"):
        sla_attention(x, x, x)


def test_the_choice_checks_its_arguments_too():
    with pytest.raises(ValueError, match=r"topk must be in \(0, 1\], got 2"):
        select_blocks(X, X, topk=2)


def _gradients(q, k, v, impl, feature_map, linear, key_mask, **settings):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    weights = {"proj_l_weight": torch.eye(16, device=q.device).requires_grad_()}
    if feature_map == "hedgehog":
        phi = torch.eye(16, device=q.device).requires_grad_()
        weights |= {"phi_q_weight": phi, "phi_k_weight": phi}
    o = sla_attention(
        *leaves, topk=0.5, blkq=16, blkk=32, feature_map=feature_map, linear=linear, impl=impl, key_mask=key_mask,
        keep_k=(0, 5), **weights, **settings,
    )  # fmt: skip
    return o.detach(), *torch.autograd.grad(
        o.square().sum(), [*leaves, *{id(w): w for w in weights.values()}.values()]
    )


@pytest.mark.parametrize("impl", ["triton", "eager", "reference"])
@pytest.mark.parametrize(("feature_map", "linear"), [("softmax", "all"), ("elu", "marginal"), ("hedgehog", "all")])
def test_nothing_that_a_mask_hides_reaches_anyone(impl, feature_map, linear, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 133, 16, device=device) for _ in range(3))
    mask = torch.ones(1, 133, dtype=torch.bool, device=device)
    mask[:, 5] = mask[:, 40:90] = mask[:, 131] = False
    expected = _gradients(q, k, v, impl, feature_map, linear, mask)
    assert torch.equal(expected[2][:, :, 5], torch.zeros_like(expected[2][:, :, 5]))
    for number in (float("nan"), float("inf")):
        k[:, :, ~mask[0]] = number
        v[:, :, ~mask[0]] = number
        got = _gradients(q, k, v, impl, feature_map, linear, mask)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # eager's sums on a GPU vary in order


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_a_second_derivative_is_refused(impl, device):
    q, k, v = (torch.randn(1, 1, 32, 16, device=device).requires_grad_() for _ in range(3))
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl=impl)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)  # the incoming gradient has none of its own
    for ask in (
        lambda loss: loss.backward(retain_graph=True),
        lambda loss: torch.autograd.grad(loss, q, retain_graph=True),
        lambda loss: torch.autograd.grad(loss + q.square().sum(), q, retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match="sla_attention has no second derivative"):
            ask(dq.square().sum())
    dq.mul_(2)  # a gradient like any other


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_tangents_are_refused(impl, device):
    q, k, v = (torch.randn(1, 1, 32, 16, device=device) for _ in range(3))
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear="none", impl=impl)


@pytest.mark.parametrize("impl", ["triton", "eager", "reference"])
def test_blocks_are_chosen_as_attention_chooses_them_under_autocast(impl, device):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 512, 16, device=device) for _ in range(2))
    k = k * 0.03 + 100  # of which float16 keeps less
    with torch.autocast(device, torch.float16):
        under = select_blocks(q, k, topk=0.3, blkq=16, blkk=16, impl=impl)
    assert torch.equal(under, select_blocks(q.half(), k.half(), topk=0.3, blkq=16, blkk=16, impl=impl))
    assert not torch.equal(under, select_blocks(q, k, topk=0.3, blkq=16, blkk=16, impl=impl))


def test_triton_says_what_it_needs(device, monkeypatch):
    q = torch.randn(1, 1, 32, 16)
    for call in (lambda x: sla_attention(x, x, x, impl="triton"), lambda x: select_blocks(x, x, impl="triton")):
        with monkeypatch.context() as patched:
            patched.setattr(sparse, "INTERPRETED", False)
            with pytest.raises(ValueError, match=r"impl 'triton' needs tensors on a GPU, .* got cpu"):
                call(q)
        if device == "cpu":
            with pytest.raises(TypeError, match="interpreter multiplies bfloat16"):
                call(q.bfloat16())


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_autocast_does_not_reach_inside_the_kernels_path(linear, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, device=device).requires_grad_() for _ in range(3))
    weights = [torch.eye(16, device=device).requires_grad_() for _ in range(2)]

    def step(forward, backward):
        with torch.autocast(device, torch.float16, enabled=forward):
            x = (q, k, v) if forward else (x.half() for x in (q, k, v))
            o = sla_attention(
                *x, topk=0.5, blkq=16, blkk=16, linear=linear, proj_l_weight=weights[0], proj_s_weight=weights[1],
                impl="triton",
            )  # fmt: skip
        with torch.autocast(device, torch.bfloat16, enabled=backward):
            return o.detach(), *torch.autograd.grad(o, (q, k, v, *weights), torch.ones_like(o))

    expected = step(False, False)
    for cast in (step(True, False), step(False, True)):
        assert all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))
