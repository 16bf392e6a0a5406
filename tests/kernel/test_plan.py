import os
import subprocess
import sys
from pathlib import Path

import torch

from diffusers_sla.kernel import sla_attention
from diffusers_sla.kernel.plan import ALIGN, Plan, layout, like


def test_a_repeated_call_launches_what_its_first_did():
    """With Triton's compiler and a stand-in for the driver, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("replays.py")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout == "as the first time\n"


def test_scratch_is_shared_by_what_is_not_needed_at_once():
    cpu = torch.device("cpu")
    plan = Plan(cpu, [])
    a, b, c, d = (plan.empty((n,), torch.uint8) for n in (1000, 300, 600, 200))
    for used in ((a,), (a, b), (b, c), (b, c, d)):
        plan.launch(None, (1,), *used)
    plan.done()
    assert [a.offset, b.offset, c.offset, d.offset] == [0, 1024, 0, 640]
    assert plan.bytes == 1324
    assert all(x.offset % ALIGN == 0 for x in (a, b, c, d))


def test_scratch_lies_in_what_is_written_last_where_it_fits():
    plan = Plan(torch.device("cpu"), [(torch.float32, (300,), (1,), 0)])
    plan.spare = plan.given[0]
    a, b, c, d = (plan.empty((n,), torch.uint8) for n in (1000, 200, 600, 100))
    for used in ((a,), (a, b), (c,), (c, d), (plan.spare, d)):
        plan.launch(None, (1,), *used)
    plan.done()
    assert [x.at for x in (a, b, c, d)] == [0, 2, 0, 2]  # b finds no room beside a, d is needed until the end
    assert [x.offset for x in (a, b, c, d)] == [0, 0, 0, 0]
    assert plan.bytes == 200


def test_layouts_tell_apart_what_kernels_are_compiled_for():
    x = torch.empty(5, 4, dtype=torch.float16)
    assert layout(x) == layout(torch.empty(5, 4, dtype=torch.float16))
    others = [x[1:], x.T, x.float(), x[:, :2], x.flatten()[1:17].view(4, 4)]
    assert len({layout(x), *map(layout, others)}) == 6
    assert like(layout(x.T[1:])) == (torch.float16, (3, 5), torch.empty_like(x.T[1:]).stride(), 0)
    assert layout(None) is like(None) is None


def test_weights_and_masks_of_any_strides(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 16, device=device) for _ in range(3))
    w, b = torch.randn(16, 16, device=device), torch.randn(16, 2, device=device)[:, 0]
    mask = (torch.rand(1, 64, device=device) > 0.3).expand(2, 64)
    leaves = [x.requires_grad_() for x in (q, k, v, w, b)]

    def run(w, a, b, mask):
        o = sla_attention(
            q, k, v, topk=0.5, blkq=16, blkk=16, proj_l_weight=w, proj_s_weight=a, proj_l_bias=b, key_mask=mask,
            impl="triton",
        )  # fmt: skip
        return o, *torch.autograd.grad(o.square().sum(), leaves)

    strided = run(w.T, w.T, b, mask)
    plain = run(w.T.contiguous(), w.T.contiguous(), b.contiguous(), mask.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
