import pytest
import torch
import torch.nn.functional as F

from diffusers_sla import SLAConfigError, SLAUnsupportedError, SparseLinearAttention, sla_attention


def inputs(Lq=200, Lk=200, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(1, 2, L, 16).to(dtype) for L in (Lq, Lk, Lk))


def test_state_dict_has_the_references_names_zero_and_float32():
    state = SparseLinearAttention(16, 0.2).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "proj_l.weight": (16, 16), "proj_l.bias": (16,)
    }  # fmt: skip
    assert all(tensor.dtype is torch.float32 and not tensor.any() for tensor in state.values())


def test_it_is_the_op_in_bfloat16_and_returns_the_inputs_dtype():
    module = SparseLinearAttention(16, 0.3, feature_map="elu", BLKQ=32, BLKK=16)
    torch.nn.init.normal_(module.proj_l.weight)
    torch.nn.init.normal_(module.proj_l.bias)
    q, k, v = inputs()
    o, kept = module(q, k, v, return_sparsity=True)
    expected = sla_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), topk=0.3, blkq=32, blkk=16, feature_map="elu",
        proj_l_weight=module.proj_l.weight, proj_l_bias=module.proj_l.bias,
    )  # fmt: skip
    assert o.dtype is torch.float32
    assert torch.equal(o, expected.float())
    assert kept == int(0.3 * 13) / 13
    o.sum().backward()
    assert module.proj_l.weight.grad.abs().max() > 0


def test_a_topk_of_less_than_a_block_keeps_one_and_lengths_may_differ():
    module = SparseLinearAttention(16, 0.01, use_bf16=False)
    o, kept = module(*inputs(Lq=320, Lk=512), return_sparsity=True)
    assert o.shape == (1, 2, 320, 16)
    assert o.isfinite().all()
    assert kept == 1 / 8


def test_inputs_of_any_strides():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 64) for _ in range(3))
    module = SparseLinearAttention(16, 0.5, BLKQ=16, BLKK=16, use_bf16=False)
    strided = module(*(x.transpose(2, 3) for x in (q, k, v)))
    assert torch.equal(strided, module(*(x.transpose(2, 3).contiguous() for x in (q, k, v))))


def test_all_blocks_and_a_zero_projection_are_dense_attention():
    q, k, v = (x.half() for x in inputs())
    o = SparseLinearAttention(16, 1.0, use_bf16=False)(q, k, v)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=2e-3, atol=2e-3)


def test_bad_settings_are_named():
    with pytest.raises(SLAConfigError, match=r"topk must be a number in \(0, 1\], got 0"):
        SparseLinearAttention(16, 0)
    with pytest.raises(SLAConfigError, match="head_dim must be an int from 1 to 256, got 300"):
        SparseLinearAttention(300, 0.2)
    with pytest.raises(SLAConfigError, match=r"use_bf16 must be True or False, got torch\.float16"):
        SparseLinearAttention(16, 0.2, use_bf16=torch.float16)
    with pytest.raises(SLAUnsupportedError, match="hedgehog"):
        SparseLinearAttention(16, 0.2, feature_map="hedgehog")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a float tensor, got NoneType"),
        ({"k": torch.zeros(1, 2, 200, 16, dtype=torch.int32)}, TypeError, "k must be a float tensor, got torch.int32"),
        ({"v": torch.zeros(())}, ValueError, r"v must be \[B, H, L, 16\], .* got shape \(\)"),
        ({"q": torch.zeros(1, 2, 200, 24)}, ValueError, r"q must be \[B, H, L, 16\], .* got shape \(1, 2, 200, 24\)"),
    ],
)
def test_bad_inputs_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        SparseLinearAttention(16, 0.2)(**dict(zip("qkv", inputs(), strict=True)) | changed)


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    module = SparseLinearAttention(16, 0.4, BLKQ=16, BLKK=16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs()), module(*inputs()))
