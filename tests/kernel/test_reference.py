import pytest
import torch
import torch.nn.functional as F

from diffusers_sla.kernel import sla_attention


def test_all_blocks_without_a_projection_is_dense_attention():
    q, k, v = (torch.randn(2, 2, 50, 8, dtype=torch.float64) for _ in range(3))
    o = sla_attention(q, k, v, topk=1.0, blkq=16, blkk=16, linear="none", impl="reference")
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(("linear", "expected"), [("none", 1.0), ("marginal", 1.0 + 3.0), ("all", 1.0 + 2.0)])
def test_two_blocks_by_hand(linear, expected):
    # Block 0 (values 1) is critical, block 1 (values 3) marginal; phi is constant, so the linear branch is a mean.
    q = torch.ones(1, 1, 16, 1, dtype=torch.float64)
    k = torch.cat([torch.ones(1, 1, 16, 1), -torch.ones(1, 1, 16, 1)], 2).double()
    v = torch.cat([torch.ones(1, 1, 16, 1), 3 * torch.ones(1, 1, 16, 1)], 2).double()
    weight = None if linear == "none" else torch.ones(1, 1, dtype=torch.float64)
    o = sla_attention(q, k, v, topk=0.5, blkq=16, blkk=16, linear=linear, proj_l_weight=weight, impl="reference")
    torch.testing.assert_close(o, torch.full_like(o, expected), rtol=1e-5, atol=0)


def test_gradients_of_every_input():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, 32, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    tensors += [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def op(q, k, v, w, a, mq, mk):
        return sla_attention(
            q, k, v, topk=0.5, blkq=16, blkk=16, feature_map="hedgehog", linear="marginal", proj_l_weight=w,
            proj_s_weight=a, phi_q_weight=mq, phi_k_weight=mk, impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, tensors)
