"""Whether a repeated call launches what its first did, with a stand-in for the driver: no GPU, no interpreter.

    python tests/kernel/replays.py

The first call of a plan goes through Triton's own binding of arguments. Addresses are compared as what they are the
address of: the number of a tensor in the call, and an offset in it.
"""

import gc
import sys
import threading
import weakref
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from host_time import use_idle_driver

from diffusers_sla.kernel import launch, sla_attention
from diffusers_sla.kernel.launch import Launch

IDLE = use_idle_driver()
EMPTY = {"empty": torch.empty, "empty_like": torch.empty_like}
CASES = [
    {"D": 32, "Lk": 200},
    {"D": 16, "mask": True, "Hkv": 1, "keep_q": (3, 5), "keep_k": (0, 7), "bias": False, "Lk": 70},
    {"D": 16, "linear": "none", "blhd": True},
]


class Call:
    """A forward and, if there is one, its backward; `launches` holds what the launchers were called with."""

    def __init__(self, D, L=150, Lk=150, Hkv=2, mask=False, bias=True, blhd=False, shift=0, grad=True, **settings):
        def tokens(heads, length):
            flat = torch.empty(length * heads * D + 8, dtype=torch.float16)[shift : shift + length * heads * D]
            x = flat.view(1, length, heads, D).transpose(1, 2) if blhd else flat.view(1, heads, length, D)
            return x.requires_grad_(grad)

        self.inputs = [tokens(2, L), tokens(Hkv, Lk), tokens(Hkv, Lk)]
        weights = {"proj_l_weight": torch.zeros(D, D, requires_grad=grad)}
        if bias:
            weights["proj_l_bias"] = torch.zeros(D, requires_grad=grad)
        key_mask = torch.ones(1, Lk, dtype=torch.bool) if mask else None
        self.tensors = [*self.inputs, *weights.values(), *([key_mask] if mask else [])]
        do = torch.zeros(self.inputs[0].shape, dtype=torch.float16)
        IDLE.launched = []
        try:
            self.watched(*self.inputs, do, key_mask=key_mask, **weights, **settings)
        finally:
            for name, make in EMPTY.items():
                setattr(torch, name, make)
        self.launches = [self.named(*entry) for entry in IDLE.launched]
        IDLE.launched = None

    def watched(self, q, k, v, do, **settings):
        def watch(make):
            def made(*arguments, **options):
                tensor = make(*arguments, **options)
                if tensor.device.type != "meta":
                    self.tensors.append(tensor)
                return tensor

            return made

        for name, make in EMPTY.items():
            setattr(torch, name, watch(make))
        self.tensors.append(do)
        settings = {"topk": 0.3, "blkq": 64, "blkk": 64, "impl": "triton"} | settings
        o = sla_attention(q, k, v, **settings)
        if o.requires_grad:
            wanted = [x for x in self.tensors[:5] if x.requires_grad]
            torch.autograd.grad(o, wanted, do, allow_unused=True)

    def named(self, name, function, grid, stream, arguments):
        return (name, function, grid, stream, *(self.place(x) for x in arguments))

    def place(self, x):
        """(number of the tensor, offset) of an address, other arguments as they are."""
        if isinstance(x, torch.Tensor):
            x = x.data_ptr()
        if type(x) is not int:
            return x
        for number, tensor in enumerate(self.tensors):
            if 0 <= x - tensor.data_ptr() < tensor.untyped_storage().nbytes():
                return number, x - tensor.data_ptr()
        assert x < 1 << 32, f"{x} is in no tensor of the call"  # a heap may begin lower, though
        return x


def repeated_calls_launch_the_same():
    for case in CASES:
        first = Call(**case)
        assert [entry[0] for entry in first.launches].count("_sparse_bwd_dkdv_kernel") == 1
        assert Call(**case).launches == first.launches, case
        assert Call(**case).launches == first.launches, case
        assert sum(type(x) is tuple for entry in first.launches for x in entry[4:]) > 30  # addresses were compared
    first, again = (Call(**CASES[0], grad=False) for _ in range(2))
    assert again.launches == first.launches


def no_tensor_of_a_call_is_kept():
    call = Call(D=16, L=96)
    tensors = [weakref.ref(x) for x in call.tensors]
    del call
    gc.collect()
    assert not any(x() is not None for x in tensors)


def other_alignments_take_other_kernels():
    aligned = Call(**CASES[0], grad=False)
    for _ in range(2):
        shifted = Call(**CASES[0], grad=False, shift=1)
        assert [entry[0] for entry in shifted.launches] == [entry[0] for entry in aligned.launches]
        pairs = zip(shifted.launches, aligned.launches, strict=True)
        assert [a[0] for a, b in pairs if a[1] != b[1]] == ["_prepare_kernel", "_sparse_fwd_kernel"]  # they read q
    assert Call(**CASES[0], grad=False).launches == aligned.launches


def a_changed_table_is_used_at_once():
    before = Call(**CASES[0], grad=False)
    table = launch.table(torch.device("cpu"))
    table["prepare 32x2 64x1"] = Launch(rows=16, block_c=32)
    changed = Call(**CASES[0], grad=False)
    assert changed.launches[0][2] != before.launches[0][2]
    table.clear()
    assert Call(**CASES[0], grad=False).launches == before.launches


def the_stream_is_that_of_the_call():
    Call(**CASES[0])
    IDLE.stream = 7
    assert {entry[3] for entry in Call(**CASES[0]).launches} == {7}
    IDLE.stream = 0


def hooks_hear_of_every_launch():
    call = Call(**CASES[0])
    hooks = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel
    kept, heard = hooks.launch_enter_hook, []
    if hasattr(kept, "add"):
        kept.add(heard.append)
    else:
        hooks.launch_enter_hook = heard.append
    assert Call(**CASES[0]).launches == call.launches
    if hasattr(kept, "add"):
        kept.remove(heard.append)
    else:
        hooks.launch_enter_hook = kept
    assert [metadata.get()["name"] for metadata in heard] == [entry[0] for entry in call.launches]
    assert Call(**CASES[0]).launches == call.launches
    assert len(heard) == len(call.launches)


def threads_share_a_plan():
    def work():
        for _ in range(50):
            sla_attention(q, q, q, topk=0.3, blkq=64, blkk=64, proj_l_weight=w, impl="triton")

    q, w = torch.zeros(1, 2, 112, 32, dtype=torch.float16), torch.zeros(32, 32)
    IDLE.launched = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [entry[0] for entry in IDLE.launched]
    assert {name: names.count(name) for name in names} == dict.fromkeys(
        ("_prepare_kernel", "_select_kernel", "_sparse_fwd_kernel"), 200
    )


if __name__ == "__main__":
    repeated_calls_launch_the_same()
    no_tensor_of_a_call_is_kept()
    other_alignments_take_other_kernels()
    a_changed_table_is_used_at_once()
    the_stream_is_that_of_the_call()
    hooks_hear_of_every_launch()
    threads_share_a_plan()
    print("as the first time")
