"""The forward of forward.py for Hopper, in half precision with blocks of 64 keys, in Triton's Gluon dialect.

Triton loads a tile ahead into a buffer of its own, which leaves room for two programs on a multiprocessor. Here keys
and values have one buffer each, that is filled again as soon as it has been read: three programs (four at head size
64) hide each other's waiting. Not for key masks, hedgehog, proj_s, scales below 0, and rows that do not begin at
multiples of 16 bytes: those take the Triton kernel.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .forward import num_rows
from .launch import cdiv

# Its name as of Triton 3.9, and before.
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# Registers a thread by head size: three programs of 128 threads on a multiprocessor, or four.
REGISTERS = {64: 128, 128: 168}


@gluon.jit
def _exp(x, top):
    return gl.exp2(x * 1.4426950408889634 - (top * 1.4426950408889634)[:, None])


@gluon.jit
def _phi(x, top, PHI: gl.constexpr):
    if PHI == "softmax":
        f = _exp(x, top)
    elif PHI == "elu":
        f = gl.where(x > 0, x + 1.0, _exp(gl.minimum(x, 0.0), top))
    else:
        f = gl.maximum(x, 0.0)
    return f


@gluon.jit
def _copy(tile, pointers, mask=None):
    """Start filling a tile of shared memory; what is masked becomes 0."""
    _load(tile, pointers, mask)
    async_copy.commit_group()


@gluon.jit
def _place(stride: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr = 64, W: gl.constexpr = 4):
    """Offsets of a [ROWS, D] tile of rows, int64, for W warps. What a thread adds from one of its rows to the next
    is a constant."""
    STEP: gl.constexpr = W * 256 // D
    L3: gl.constexpr = gl.BlockedLayout([ROWS // STEP, 1, 8], [1, 256 // D, D // 8], [1, W, 1], [2, 1, 0])
    part = gl.arange(0, ROWS // STEP, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3))).to(gl.int64)[:, None, None]
    r = gl.arange(0, STEP, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3))).to(gl.int64)[None, :, None]
    c = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :]
    at = ((r * stride + c) + part * (STEP * stride)).reshape([ROWS, D])
    return gl.max_contiguous(gl.multiple_of(at, [1, 8]), [1, 8])


@gluon.jit
def _listed(blocks, at, is_kept, KEEP_Q: gl.constexpr):
    """The block at that place of a query block's list; kept queries have none."""
    if KEEP_Q:
        return gl.load(blocks + at, mask=is_kept == 0, other=0)
    else:
        return gl.load(blocks + at)


@gluon.jit
def _arrived(MORE: gl.constexpr):
    """Wait for all copies but the last MORE, then let the tensor cores see them."""
    async_copy.wait_group(MORE)
    fence_async_shared()


@gluon.jit
def _scores(q, k, zero):
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _add(a, b, total):
    total = warpgroup_mma(a, b, total, is_async=True)
    return warpgroup_mma_wait(0, deps=[total])


@gluon.jit
def _softmax(s, acc, row_sum, row_max, scale_log2, MASKED: gl.constexpr, ROWS: gl.constexpr):
    """One step of online softmax; row_max: before scaling. ROWS: the layout of acc's rows."""
    new_max = gl.maximum(row_max, gl.max(s, 1))
    top = new_max
    if MASKED:
        top = gl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    top = top * scale_log2
    p = gl.exp2(s * scale_log2 - top[:, None])
    rescale = gl.exp2(row_max * scale_log2 - top)
    row_sum = row_sum * rescale + gl.sum(p, 1)
    acc = acc * gl.convert_layout(rescale, ROWS)[:, None]
    return p, acc, row_sum, new_max


@gluon.jit(do_not_specialize=["Lq", "Lk", "q_first", "q_end", "k_first", "k_end", "num_front", "num_kept", "num_q_blocks", "M_BLOCKS", "topk", "eps"])  # fmt: skip  # noqa: E501
def _hopper_fwd_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, m_ptr, z_ptr, bias_ptr, o_ptr, o_s_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_ob, stride_oh, stride_ol,
    H, M_BLOCKS, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_q_blocks, num_rows,
    topk, scale_log2, eps,
    stride_kl: gl.constexpr, stride_vl: gl.constexpr, GROUP: gl.constexpr, M_GROUP: gl.constexpr,
    D: gl.constexpr, BLKQ: gl.constexpr, PHI: gl.constexpr,
    KEEP_Q: gl.constexpr, HAS_LINEAR: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """As `_sparse_fwd_kernel`, whose arguments these are, with BLOCK_M = BLOCK_N = BLKK = 64, D 64 or 128."""
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [64, D], SHARED)
    k = gl.allocate_shared_memory(dtype, [64, D], SHARED)
    v = gl.allocate_shared_memory(dtype, [64, D], SHARED)

    pid = gl.program_id(0)
    b, h = gl.program_id(2).to(gl.int64), gl.program_id(1).to(gl.int64)
    bh = b * H + h
    h_kv = h // GROUP
    is_kept = pid < num_kept
    block = (pid - num_kept) // (BLKQ // 64)
    row = q_first + (pid - num_kept) * 64
    row_end = q_end
    if KEEP_Q:
        if is_kept:
            row = gl.where(pid < num_front, pid * 64, q_end + (pid - num_front) * 64)
            row_end = gl.where(pid < num_front, q_first, Lq)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, BLOCKED))
    c = gl.arange(0, D, layout=gl.SliceLayout(0, BLOCKED))
    rows = (row + r).to(gl.int64)[:, None]
    inside = (row + r < row_end)[:, None]
    _copy(q, q_ptr + b * stride_qb + h * stride_qh + rows * stride_ql + c[None, :], inside)

    # The keys of whole blocks: a query block's list; for kept queries all there are.
    k_base = k_ptr + b * stride_kb + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + h_kv * stride_vh
    k_tile = _place(stride_kl, D)
    v_tile = _place(stride_vl, D)
    blocks = indices_ptr + (bh * num_q_blocks + block) * topk
    # The list ascends, so only its last block may be ragged.
    last = k_first + _listed(blocks, topk - 1, is_kept, KEEP_Q) * 64
    num_ragged = (last + 64 > k_end).to(gl.int32)
    front_end = k_first
    back = k_end
    num_whole = topk - num_ragged
    if KEEP_Q:
        if is_kept:
            num_ragged = 0
            front_end = 0
            num_whole = Lk // 64
            back = num_whole * 64
    first = k_first + _listed(blocks, 0, is_kept, KEEP_Q) * 64
    if KEEP_Q:
        first = gl.where(is_kept, 0, first)
    _copy(k, k_base + first.to(gl.int64) * stride_kl + k_tile, num_whole > 0)
    _copy(v, v_base + first.to(gl.int64) * stride_vl + v_tile, num_whole > 0)
    acc = gl.zeros([64, D], gl.float32, O)
    row_max = gl.full([64], float("-inf"), gl.float32, S_ROWS)
    row_sum = gl.zeros([64], gl.float32, S_ROWS)
    zero = gl.zeros([64, 64], gl.float32, S)
    for step in range(num_whole):
        more = step + 1 < num_whole
        first = k_first + _listed(blocks, gl.minimum(step + 1, topk - 1), is_kept, KEEP_Q) * 64
        if KEEP_Q:
            first = gl.where(is_kept, (step + 1) * 64, first)
        at = first.to(gl.int64)
        _arrived(1)
        s = _scores(q, k, zero)
        _copy(k, k_base + at * stride_kl + k_tile, more)
        p, acc, row_sum, row_max = _softmax(s, acc, row_sum, row_max, scale_log2, False, O_ROWS)
        p = gl.convert_layout(p.to(dtype), OPERAND)
        _arrived(1)
        acc = _add(p, v, acc)
        _copy(v, v_base + at * stride_vl + v_tile, more)
    async_copy.wait_group(0)

    # What is left: the ragged block, and the kept keys before and after the blocks.
    num_front_steps = (front_end + 63) // 64
    n = gl.arange(0, 64, layout=gl.SliceLayout(0, S))
    for step in range(num_ragged + num_front_steps + (Lk - back + 63) // 64):
        kept_step = step - num_ragged
        first = back + (kept_step - num_front_steps) * 64
        end = Lk
        if kept_step < num_front_steps:
            first = kept_step * 64
            end = front_end
        if kept_step < 0:
            first = last
            end = k_end
        at = first.to(gl.int64)
        there = gl.convert_layout((first + r < end)[:, None], k_tile.type.layout)
        _copy(k, k_base + at * stride_kl + k_tile, there)
        _copy(v, v_base + at * stride_vl + v_tile, there)
        _arrived(1)
        s = gl.where((first + n < end)[None, :], _scores(q, k, zero), float("-inf"))
        p, acc, row_sum, row_max = _softmax(s, acc, row_sum, row_max, scale_log2, True, O_ROWS)
        p = gl.convert_layout(p.to(dtype), OPERAND)
        _arrived(0)
        acc = _add(p, v, acc)

    o_at = b * stride_ob + h * stride_oh + rows * stride_ol + c[None, :]
    empty = row_sum == 0.0
    den = gl.convert_layout(gl.where(empty, 1.0, row_sum), O_ROWS)
    if SAVE:
        s_rows = row + gl.arange(0, 64, layout=S_ROWS)
        lse = gl.where(empty, float("inf"), gl.log2(row_sum) + row_max * scale_log2)
        if KEEP_Q:
            gl.store(lse_ptr + bh * num_rows + s_rows, lse, mask=s_rows < row_end)
        else:  # the rows that fill up the last block, too: p = 0 in the backward
            gl.store(lse_ptr + bh * num_rows + s_rows, gl.where(s_rows < row_end, lse, float("inf")))
        acc = acc / den[:, None]
        den = gl.full([64], 1.0, gl.float32, O_ROWS)
        o_s_at = (bh * Lq + rows) * D + c[None, :]
        gl.store(o_s_ptr + o_s_at, gl.convert_layout(acc.to(dtype), BLOCKED), mask=inside)
    if HAS_LINEAR:
        if not is_kept:
            m_head = b * (H // M_GROUP) + h // M_GROUP
            feature = (m_head * M_BLOCKS + gl.where(M_BLOCKS == 1, 0, block)) * D
            m_tile = r[:, None] * D + c[None, :]
            _copy(k, m_ptr + feature * D + m_tile)
            if D == 128:
                _copy(v, m_ptr + (feature + 64) * D + m_tile)
            x = q.slice(0, 64, dim=1).load(S).to(gl.float32)
            x_right = x
            if D == 128:
                x_right = q.slice(64, 64, dim=1).load(S).to(gl.float32)
            top = gl.zeros([64], gl.float32, S_ROWS)
            if PHI == "softmax":
                top = gl.max(gl.maximum(x, x_right), 1)
            total = _phi(x, top, PHI)
            weighted = total * gl.load(z_ptr + feature + n)[None, :]
            f = gl.convert_layout(total.to(dtype), OPERAND)
            f_right = f
            if D == 128:
                right = _phi(x_right, top, PHI)
                total += right
                weighted += right * gl.load(z_ptr + feature + 64 + n)[None, :]
                f_right = gl.convert_layout(right.to(dtype), OPERAND)
            phi_z = gl.sum(weighted, 1)
            if PHI == "softmax":
                phi_z += eps * gl.sum(total, 1)
            else:
                phi_z += eps
            # (O_s (phi z) + phi M) / (phi z): the product goes into the sums that are there, and one division is left.
            phi_z = gl.convert_layout(phi_z, O_ROWS)
            acc = acc * (phi_z / den)[:, None]
            _arrived(0)
            acc = _add(f, k, acc)
            if D == 128:
                acc = _add(f_right, v, acc)
            den = phi_z
    o = acc * (1.0 / den)[:, None]
    if HAS_BIAS:
        bias = gl.load(bias_ptr + gl.arange(0, D, layout=gl.SliceLayout(0, O))).to(gl.float32)
        if KEEP_Q:
            bias = gl.where(is_kept, 0.0, bias)
        o += bias[None, :]
    gl.store(o_ptr + o_at, gl.convert_layout(o.to(dtype), BLOCKED), mask=inside)


def hopper_fwd(run, q, k, v, indices, m, z, bias, o, o_s, lse, blkq, keep_q, keep_k, feature_map, scale, eps):
    """`sparse_fwd` of a call that this kernel takes."""
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    num_q_blocks, topk = indices.shape[2:]
    num_front, num_back = cdiv(keep_q[0], 64), cdiv(keep_q[1], 64)
    num_kept = num_front + num_back
    run.launch(
        _hopper_fwd_kernel, (num_kept + num_q_blocks * (blkq // 64), H, B),
        q, k, v, indices, m, z, bias, o, o_s, lse,
        *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *o.stride()[:3],
        H, 1 if m is None else m.shape[2],
        Lq, Lk, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1], num_front, num_kept, num_q_blocks,
        num_rows(Lq, blkq), topk,
        max(scale * math.log2(math.e), 1e-30), eps,  # never 0: it multiplies -inf
        stride_kl=k.stride()[2], stride_vl=v.stride()[2],
        GROUP=H // Hkv, M_GROUP=1 if m is None else H // m.shape[1], D=D, BLKQ=blkq, PHI=feature_map,
        KEEP_Q=num_kept > 0, HAS_LINEAR=m is not None, HAS_BIAS=bias is not None, SAVE=o_s is not None,
        num_warps=4, maxnreg=REGISTERS[D],
    )  # fmt: skip
