"""Compile the kernels for a GPU that need not be there, with the tiles that launch.py gives it.

    python tests/kernel/ahead_of_time.py cuda 86      # or: hip gfx942

Prints one line per kernel that takes more shared memory than the GPU has, and how many were compiled. Not under
TRITON_INTERPRET, which replaces the compiler.
"""

import itertools
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from diffusers_sla.kernel import backward, forward, launch, linear, prepare, projection, selection, sparse

MODULES = [forward, backward, linear, prepare, projection, selection]
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.uint32: "u32",
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
# D, dtype, blkq, blkk, feature map, and whether there are a key mask and tokens that are always kept
CASES = [
    (128, torch.bfloat16, 64, 64, "softmax", False),
    (128, torch.bfloat16, 128, 64, "softmax", False),
    (128, torch.float16, 128, 128, "hedgehog", False),
    (128, torch.float16, 64, 64, "softmax", False),
    (64, torch.float16, 64, 64, "softmax", True),
    (80, torch.float16, 64, 128, "elu", True),
    (256, torch.float16, 64, 64, "hedgehog", False),
    (64, torch.bfloat16, 64, 64, "softmax", False),
    (40, torch.bfloat16, 64, 64, "elu", False),
    (256, torch.bfloat16, 64, 64, "softmax", False),
    (128, torch.float32, 64, 64, "softmax", False),
    (256, torch.float32, 64, 64, "hedgehog", True),
    (256, torch.float32, 64, 128, "hedgehog", True),
]


class Compiled:
    """Stands for a kernel: a launch compiles it instead."""

    def __init__(self, kernel, target, made):
        self.kernel, self.target, self.made = kernel, target, made

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps=4, num_stages=3, maxnreg=None, enable_fp_fusion=True, **constants):
        given = dict(zip((p.name for p in self.kernel.params), arguments, strict=False)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if (
                parameter.is_constexpr
                or value is None
                or (type(value) is int and value == 1 and not parameter.do_not_specialize)
            ):
                signature[parameter.name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{NAMES[value.dtype]}"
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        kind = ASTSource
        if self.kernel.__name__.startswith("_hopper"):
            from triton.experimental.gluon._runtime import GluonASTSource as kind
        source = kind(self.kernel, signature, constexprs, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        options |= {"maxnreg": maxnreg} if maxnreg else {}
        self.made.append((self.kernel.__name__, compile(source, target=self.target, options=options).metadata.shared))


def launches(D, dtype, blkq, blkk, feature_map, masked):
    """Every launch of a forward and a backward, on tensors that nobody reads."""
    q = torch.zeros(1, 2, 512, D, dtype=dtype)
    weight, phi = torch.zeros(D, D), torch.zeros(D, D) if feature_map == "hedgehog" else None
    inputs = (
        q,
        q,
        q,
        weight,
        weight[0],
        weight,
        phi,
        phi,
        torch.ones(1, 512, dtype=torch.bool) if masked else None,
        None,
    )
    settings = (blkq, blkk, feature_map, "all", (9, 0, 13, 17) if masked else (0, 0, 0, 0))
    o, memory = sparse._compute_forward(*inputs, 0.25, 0.0, 1.0, *settings, True)
    sparse._compute_backward(o, *inputs, memory, 0.25, 1.0, *settings)
    if launch.takes_gluon(q) and feature_map != "hedgehog" and blkk == 64:
        inputs = (*inputs[:5], None, *inputs[6:])
        for linear, keep, save in itertools.product(("all", "none"), ((0, 0, 0, 0), (9, 0, 13, 17)), (False, True)):
            given = inputs if linear == "all" else (*inputs[:3], None, None, *inputs[5:])
            sparse._compute_forward(*given, 0.25, 0.0, 1.0, blkq, blkk, feature_map, linear, keep, save)


def main(backend, arch, count=None):
    if backend == "cuda":
        target = GPUTarget(backend, int(arch), 32)
        limit = launch.SHARED.get((int(arch[:-1]), int(arch[-1])), launch.SMALL_SHARED)
    else:
        target, limit = GPUTarget(backend, arch, 64), launch.ROCM_SHARED
        for module in (launch, linear, prepare):
            module.PRECISION = "ieee"
        for module in (linear, projection, selection):
            module.rounded_precision = lambda dtype: "ieee"
    launch.shared_memory = lambda device: limit
    if arch == "90":
        from diffusers_sla.kernel import hopper, hopper_linear, hopper_prepare

        launch.has_gluon = lambda device: True
        MODULES.extend([hopper, hopper_linear, hopper_prepare])
    made: list[tuple[str, int]] = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name), target, made))
    for case in itertools.islice(CASES, count):
        before = len(made)
        launches(*case)
        for name, shared in made[before:]:
            if shared > limit:
                print(f"{name} takes {shared} bytes of shared memory, {arch} has {limit}: {case}")
    print(f"compiled {len(made)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
