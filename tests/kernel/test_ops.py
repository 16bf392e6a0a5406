"""The kernels as torch operators: schemas, fake tensors, whole-graph tracing, checkpointing."""

import torch
from torch.utils.checkpoint import checkpoint

from diffusers_sla.kernel import sla_attention


def _tensors(device, L=48):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, L, 16, device=device, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(16, 16, device=device, requires_grad=True)


def _op(q, k, v, w):
    return sla_attention(q, k, v, topk=0.4, blkq=16, blkk=16, proj_l_weight=w, impl="triton")


def test_the_forward_op_passes_opcheck(device):
    from diffusers_sla.kernel.sparse import _forward

    q, k, v, w = _tensors(device)
    arguments = (
        q, k, v, w, None, None, None, None, None, None, 0.4, 0.0, 0.25, 16, 16, "softmax", "all", [0, 0, 0, 0], True,
    )  # fmt: skip
    torch.library.opcheck(
        _forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_one_graph_whatever_the_length(device):
    torch._dynamo.reset()
    compiled = torch.compile(_op, fullgraph=True, backend="aot_eager", dynamic=True)
    for L in (48, 80):
        tensors = _tensors(device, L)
        actual, expected = compiled(*tensors), _op(*tensors)
        assert torch.equal(actual, expected)
        gradients = (torch.autograd.grad(o.square().sum(), tensors) for o in (actual, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_gives_the_same_gradients(device):
    tensors = _tensors(device)
    plain = torch.autograd.grad(_op(*tensors).square().sum(), tensors)
    again = torch.autograd.grad(checkpoint(_op, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
