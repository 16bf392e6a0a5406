"""The pass of prepare.py for Hopper, in half precision with blocks of 64 keys, in Triton's Gluon dialect.

Each program takes a share of the queries beside its keys, so that their bytes come while phi is computed. Block means
and z are products with ones, from the tiles in shared memory. Not for queries in blocks of less than 64, many more
queries than keys (as where heads share keys), key masks, hedgehog, sums of marginal blocks only, given block maps, and
strides that are no multiples of 16 numbers: those take the Triton kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import _arrived, _load, _place
from .hopper_linear import _phi_of, tiles_of_a_program
from .launch import cdiv

# About how many programs share the work, by head size, and registers a thread.
PROGRAMS, REGISTERS = {64: 396, 128: 264}, 128


@gluon.jit(do_not_specialize=["q_first", "q_end", "k_first", "k_end", "num_q_blocks", "num_q_tiles", "q_tiles", "num_k_blocks", "tiles_per_chunk", "norm"])  # fmt: skip  # noqa: E501
def _hopper_prepare_kernel(
    q_ptr, k_ptr, v_ptr, q_mean_ptr, k_mean_ptr, sums_ptr, z_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    H, q_first, q_end, k_first, k_end, num_q_blocks, num_q_tiles, q_tiles, num_k_blocks, tiles_per_chunk, norm,
    stride_ql: gl.constexpr, stride_kl: gl.constexpr, stride_vl: gl.constexpr,
    D: gl.constexpr, BLKQ: gl.constexpr, PHI: gl.constexpr, HAS_LINEAR: gl.constexpr,
):  # fmt: skip
    """A chunk of a head's keys, and as many queries as fall to each program, 64 of each a step.

    Grid: (num_chunks, Hkv, B). A tile is 64 queries; q_tiles of all num_q_tiles are a program's.
    """
    W: gl.constexpr = D // 16
    # Eight lanes have eight rows, whose 16 bytes lie at all banks.
    ROWS: gl.constexpr = gl.BlockedLayout([1, D // 4], [8, 4], [W, 1], [0, 1])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])  # noqa: E741
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, W], [16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PER_BLOCK: gl.constexpr = BLKQ // 64
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    qs = gl.allocate_shared_memory(dtype, [2, 64, D], SHARED)
    ks = gl.allocate_shared_memory(dtype, [2, 64, D], SHARED)
    vs = gl.allocate_shared_memory(dtype, [2, 64, D], SHARED)

    chunk = gl.program_id(0)
    h, b = gl.program_id(1), gl.program_id(2)
    bh = b * gl.num_programs(1) + h
    program = bh * gl.num_programs(0) + chunk
    first = k_first + chunk * tiles_per_chunk * 64
    end = gl.minimum(first + tiles_per_chunk * 64, k_end)
    tile = program * q_tiles
    last_tile = gl.minimum(tile + q_tiles, num_q_tiles)
    k_base = k_ptr + b.to(gl.int64) * stride_kb + h.to(gl.int64) * stride_kh
    v_base = v_ptr + b.to(gl.int64) * stride_vb + h.to(gl.int64) * stride_vh
    origin = first.to(gl.int64)
    q_rows = _place(stride_ql, D, 64, W)
    k_rows = _place(stride_kl, D, 64, W)
    v_rows = _place(stride_vl, D, 64, W)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, k_rows.type.layout))[:, None]
    # Products with ones have sixteen equal rows; one is stored.
    same = gl.arange(0, 16, layout=gl.SliceLayout(1, SUMS))[:, None]
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))[None, :] + 0 * same
    ones = gl.full([16, 64], 1.0, dtype, gl.DotOperandLayout(0, SUMS, 2))
    nothing = gl.zeros([16, D], gl.float32, SUMS)
    q_sum = nothing
    z = nothing
    acc = gl.zeros([D, D], gl.float32, O)
    for step in range(-1, gl.maximum(tiles_per_chunk, q_tiles)):
        slot = step & 1
        _arrived(0)
        start = first + step * 64 + 64  # of the next step
        at = origin + (start - first)
        _load(ks.index(1 - slot), k_base + at * stride_kl + k_rows, r < end - start)
        if HAS_LINEAR:
            _load(vs.index(1 - slot), v_base + at * stride_vl + v_rows, r < end - start)
        block = (tile + step + 1) // PER_BLOCK
        q_head = block // num_q_blocks
        q_start = q_first + block % num_q_blocks * BLKQ + (tile + step + 1) % PER_BLOCK * 64
        q_end_here = gl.where(tile + step + 1 < last_tile, q_end, q_start)
        q_base = q_ptr + (q_head // H).to(gl.int64) * stride_qb + (q_head % H).to(gl.int64) * stride_qh
        _load(qs.index(1 - slot), q_base + q_start.to(gl.int64) * stride_ql + q_rows, r < q_end_here - q_start)
        async_copy.commit_group()
        if step >= 0:
            k = ks.index(slot)
            left = end - (first + step * 64)
            k_sum = mma_v2(ones, k.load(OPERAND), nothing)
            if HAS_LINEAR:
                f = _phi_of(k.load(ROWS).to(gl.float32), PHI, left)
                k.store(f.to(dtype))
                fence_async_shared()
                acc = warpgroup_mma(vs.index(slot).permute((1, 0)), k, acc, is_async=True)
            k_at = (bh * num_k_blocks + chunk * tiles_per_chunk + step).to(gl.int64) * D
            k_mean = k_sum * (1.0 / gl.minimum(left, 64).to(gl.float32))
            gl.store(k_mean_ptr + k_at + cols, k_mean, mask=(same == 0) & (left > 0))
            part = (tile + step) % PER_BLOCK
            if part == 0:
                q_sum = nothing
            q_sum = mma_v2(ones, qs.index(slot).load(OPERAND), q_sum)
            if (part == PER_BLOCK - 1) & (tile + step < last_tile):
                block = (tile + step) // PER_BLOCK
                count = gl.minimum(q_end - q_first - block % num_q_blocks * BLKQ, BLKQ).to(gl.float32)
                gl.store(q_mean_ptr + block.to(gl.int64) * D + cols, q_sum * (1.0 / count), mask=same == 0)
            if HAS_LINEAR:
                z = mma_v2(ones, k.load(OPERAND), z)
                acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    if HAS_LINEAR:
        out = program.to(gl.int64) * D
        d = gl.arange(0, D, layout=gl.SliceLayout(1, O))[:, None]
        gl.store(sums_ptr + out * D + (d * D + gl.arange(0, D, layout=gl.SliceLayout(0, O))[None, :]), acc * norm)
        gl.store(z_ptr + out + cols, z * norm, mask=same == 0)


def hopper_prepare(run, q, k, v, blkq, keep_q, keep_k, feature_map, linear, norm):
    """`prepare` of a call that this kernel takes."""
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    num_q_blocks, num_k_blocks = cdiv(Lq - sum(keep_q), blkq), cdiv(Lk - sum(keep_k), 64)
    tiles_per_chunk = tiles_of_a_program(num_k_blocks, B * Hkv, PROGRAMS[D])
    num_chunks = cdiv(num_k_blocks, tiles_per_chunk)
    num_q_tiles, tiles_of_block = B * H * num_q_blocks * (blkq // 64), blkq // 64
    # Whole blocks each.
    q_tiles = cdiv(cdiv(num_q_tiles, num_chunks * B * Hkv), tiles_of_block) * tiles_of_block
    q_mean, k_mean = run.empty((B, H, num_q_blocks, D)), run.empty((B, Hkv, num_k_blocks, D))
    sums = z = None
    if linear:
        sums, z = run.empty((B, Hkv, num_chunks, D, D)), run.empty((B, Hkv, num_chunks, D))
    run.launch(
        _hopper_prepare_kernel, (num_chunks, Hkv, B),
        q, k, v, q_mean, k_mean, sums, z, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        H, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1], num_q_blocks, num_q_tiles, q_tiles, num_k_blocks,
        tiles_per_chunk, norm,
        stride_ql=q.stride()[2], stride_kl=k.stride()[2], stride_vl=v.stride()[2], D=D, BLKQ=blkq, PHI=feature_map,
        HAS_LINEAR=linear, num_warps=D // 16, maxnreg=REGISTERS,
    )  # fmt: skip
    return q_mean, k_mean, None, sums, z
