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

from diffusers_sla.kernel import backward, forward, launch, linear, selection

NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.uint32: "u32",
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
# D, dtype, blkq, blkk, feature map
CASES = [
    (128, torch.bfloat16, 64, 64, "softmax"),
    (128, torch.bfloat16, 128, 64, "softmax"),
    (128, torch.float16, 128, 128, "hedgehog"),
    (64, torch.bfloat16, 64, 64, "softmax"),
    (40, torch.bfloat16, 64, 64, "elu"),
    (256, torch.bfloat16, 64, 64, "softmax"),
    (128, torch.float32, 64, 64, "softmax"),
]


class Compiled:
    """Stands for a kernel: a launch compiles it instead."""

    def __init__(self, kernel, target, made):
        self.kernel, self.target, self.made = kernel, target, made

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps=4, num_stages=3, **constants):
        given = dict(zip((p.name for p in self.kernel.params), arguments, strict=False)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{NAMES[value.dtype]}"
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.made.append((self.kernel.__name__, compile(source, target=self.target, options=options).metadata.shared))


def launches(D, dtype, blkq, blkk, feature_map):
    """Every launch of a forward and a backward, on tensors that nobody reads."""
    H, L, none = 2, 512, (0, 0)
    q, k, v, do = (torch.zeros(1, H, L, D, dtype=dtype) for _ in range(4))
    features = D * forward.HALVES[feature_map]
    num_q_blocks, num_k_blocks = L // blkq, L // blkk
    phi = q if feature_map == "hedgehog" else None
    weight, bias = torch.zeros(D, D), torch.zeros(D)
    selection.prepare(q, k, v, phi, None, blkq, blkk, none, none, feature_map, "all", True, 1.0)
    means = (torch.zeros(1, H, n, D) for n in (num_q_blocks, num_k_blocks))
    indices, block_map = selection.select(*means, None, 0.25, 0.0, 1.0, dtype)
    sums, z = torch.zeros(1, H, 4, features, D), torch.zeros(1, H, 4, features)
    m, z, _ = linear.gather_sums(sums, z, None, weight, dtype)
    forward.sparse_fwd(
        q, k, v, phi, indices, None, m, z, weight, bias, blkq, blkk, none, none, feature_map, 1.0, 1e-5, True
    )
    linear.linear_bwd_q(q, do, m, z, q, blkq, none, feature_map, 1e-5, False)
    linear.linear_bwd_k(k, v, None, m, z, k, v, blkk, none, feature_map)
    backward.sparse_bwd(
        do, q, k, v, q, torch.zeros(1, H, L), indices, selection.invert(block_map, 0.25), None, q, k, v,
        blkq, blkk, none, none, 1.0, True,
    )  # fmt: skip


def main(backend, arch, count=None):
    if backend == "cuda":
        target = GPUTarget(backend, int(arch), 32)
        limit = launch.SHARED.get((int(arch[:-1]), int(arch[-1])), launch.SMALL_SHARED)
    else:
        target, limit = GPUTarget(backend, arch, 64), launch.ROCM_SHARED
        for module in (forward, backward, linear, selection):
            module.PRECISION = "ieee"
        linear.rounded_precision = selection.rounded_precision = lambda dtype: "ieee"
    launch.shared_memory = lambda device: limit
    made: list[tuple[str, int]] = []
    for module in (forward, backward, linear, selection):
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
