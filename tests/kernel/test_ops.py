"""The kernels as torch operators: schemas, fake tensors, whole-graph tracing, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffusers_sla.kernel import select_blocks, sla_attention


def _tensors(device, L=48):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, L, 16, device=device, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(16, 16, device=device, requires_grad=True)


def _op(q, k, v, w):
    return sla_attention(q, k, v, topk=0.4, blkq=16, blkk=16, proj_l_weight=w, impl="triton")


def test_the_ops_pass_opcheck(device):
    from diffusers_sla.kernel.sparse import _forward, _select

    q, k, v, w = _tensors(device)
    arguments = (
        q, k, v, w, None, None, None, None, None, None, 0.4, 0.0, 0.25, 16, 16, "softmax", "all", [0, 0, 0, 0], True,
    )  # fmt: skip
    torch.library.opcheck(_forward, arguments)
    x = [t.detach() for t in (q, k)]
    torch.library.opcheck(_select, (*x, None, 0.4, 0.0, 0.25, 16, 16, [0, 0, 0, 0]))


def test_one_graph_whatever_the_length(device):
    torch._dynamo.reset()
    compiled = torch.compile(_op, fullgraph=True, backend="aot_eager", dynamic=True)
    for L in (48, 80):
        tensors = _tensors(device, L)
        actual, expected = compiled(*tensors), _op(*tensors)
        assert torch.equal(actual, expected)
        gradients = (torch.autograd.grad(o.square().sum(), tensors) for o in (actual, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_choice_of_blocks_compiles(device):
    torch._dynamo.reset()
    q, k, _, _ = _tensors(device, 80)

    def op(q, k):
        return select_blocks(q, k, topk=0.4, blkq=16, blkk=16, keep_k=(0, 3), impl="triton")

    assert torch.equal(torch.compile(op, fullgraph=True, backend="aot_eager")(q, k), op(q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eager_compiles_as_one_graph(dtype, monkeypatch):
    monkeypatch.undo()  # conftest's NaN memory, into which Dynamo would look
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 48, 16).to(dtype) for _ in range(3))

    def op(scale):
        return sla_attention(q, k, v, topk=0.4, blkq=16, blkk=16, linear="none", scale=scale, impl="eager")

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for scale in (0.25, 0.3, 0.2):
        assert torch.equal(compiled(scale), op(scale))


def test_a_given_map_is_checked_where_the_compiled_call_runs(device):
    if device != "cpu":
        pytest.skip("on a GPU it is an assertion there, which ends the process")
    torch._dynamo.reset()
    q, k, v, _ = _tensors(device)

    def op(block_map):
        return sla_attention(q, k, v, topk=0.4, blkq=16, blkk=16, linear="none", block_map=block_map, impl="triton")

    with pytest.raises(ValueError, match=r"block_map must have 1 ones in every row, .* got 3 to 3"):
        torch.compile(op, fullgraph=True, backend="aot_eager")(torch.ones(1, 2, 3, 3, dtype=torch.int8))


def test_checkpointing_gives_the_same_gradients(device):
    tensors = _tensors(device)
    plain = torch.autograd.grad(_op(*tensors).square().sum(), tensors)
    again = torch.autograd.grad(checkpoint(_op, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def _compiled_kernels():
    """How many times Triton has compiled each of our kernels in this process."""
    from diffusers_sla.kernel import backward, forward, launch, linear, prepare, projection, selection

    modules = [forward, backward, linear, prepare, projection, selection]
    if launch.has_gluon(torch.device("cuda")):
        from diffusers_sla.kernel import hopper, hopper_linear, hopper_prepare

        modules += [hopper, hopper_linear, hopper_prepare]
    kernels = [
        value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("_") and name.endswith("_kernel")
    ]
    return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_another_length_compiles_nothing(linear):
    def run(L):
        q, k, v = (torch.randn(1, L, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        w = torch.randn(64, 64, device="cuda", requires_grad=True)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        o = sla_attention(q, k, v, topk=0.2, proj_l_weight=w, linear=linear)
        torch.autograd.grad(o.sum(), (q, k, v, w))

    run(4096)
    before = _compiled_kernels()
    for L in (4032, 3777, 2113):  # the same power of two of key blocks
        run(L)
    assert _compiled_kernels() == before


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    tensors = _tensors("cuda", 512)

    def step():
        o = _op(*tensors)
        return o, *torch.autograd.grad(o.square().sum(), tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """More numbers in a tensor than int32 counts: the last head gives what it gives alone."""
    shape = (1, 36, 500_000, 128)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    alone = [x[:, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    settings = {"topk": 0.001, "blkq": 128, "blkk": 128, "linear": "none"}
    o, expected = sla_attention(q, k, v, **settings), sla_attention(*alone, **settings)
    assert torch.equal(o[:, -1:], expected)
    do = torch.randn_like(expected)
    whole = torch.zeros_like(o)
    whole[:, -1:] = do
    gradients = torch.autograd.grad(o, (q, k, v), whole)
    for actual, right in zip(gradients, torch.autograd.grad(expected, alone, do), strict=True):
        assert torch.equal(actual[:, -1:], right)
    del q, k, v, alone, o, whole, gradients
    torch.cuda.empty_cache()  # tens of gigabytes
