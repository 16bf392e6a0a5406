"""The sparse branch forward, with the linear branch and both projections in its epilogue."""

import math

import torch
import triton
import triton.language as tl

from .features import HALVES, phi_stats, phi_tile
from .launch import block_d, cdiv, forward_config, sparse_precision, takes_gluon
from .plan import aligned


@triton.jit
def listed_block(list_base, step, there, n, BLKK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of the list that each of the BLOCK_N keys n of a step belongs to, one for all if they share it.

    Loops load it a step ahead: Triton would give an index and what it points to one pipeline stage each.
    """
    if BLOCK_N <= BLKK:
        return tl.load(list_base + step // (BLKK // BLOCK_N), mask=there, other=0)
    elif BLOCK_N == 2 * BLKK:  # two scalars, so that the compiler knows each half to be contiguous
        first = tl.load(list_base + 2 * step, mask=there, other=0)
        return tl.where(n < BLKK, first, tl.load(list_base + 2 * step + 1, mask=there, other=0))
    else:
        return tl.load(list_base + step * (BLOCK_N // BLKK) + n // BLKK, mask=there, other=0)


@triton.jit
def place_in_block(step, n, BLKK: tl.constexpr, BLOCK_N: tl.constexpr):
    if BLOCK_N < BLKK:
        return step % (BLKK // BLOCK_N) * BLOCK_N + n
    else:
        return n % BLKK


@triton.jit
def num_listed_whole(list_base, listed, k_first, k_end, BLKK: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many of the listed blocks the loop without masks can take: steps of whole blocks. The list ascends, so only
    its last block may be ragged."""
    PER_STEP: tl.constexpr = BLOCK_N // BLKK if BLOCK_N > BLKK else 1
    last = tl.load(list_base + listed - 1, mask=listed > 0, other=0)
    ragged = (k_first + (last + 1) * BLKK > k_end).to(tl.int32)
    return tl.maximum(listed - ragged, 0) // PER_STEP * PER_STEP


@triton.jit
def load_rows(
    base, first, inner, stride, cols, visible,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLKK: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_N, BLOCK_D] of rows first + inner, all of which exist; first is one for all if BLOCK_N <= BLKK.
    MASKED: 0 in rows that are not visible, as 0 times what is hidden there may be NaN."""
    if BLOCK_N <= BLKK:
        ptrs = base + first * stride + (inner[:, None] * stride + cols[None, :])
    else:
        ptrs = base + (first * stride)[:, None] + (inner[:, None] * stride + cols[None, :])
    if MASKED:
        return tl.load(ptrs, mask=visible[:, None] & (cols[None, :] < D), other=0.0)
    elif BLOCK_D == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=cols[None, :] < D, other=0.0)


@triton.jit
def masked_keys(
    step, list_base, rest, listed, k_first, k_end, front_end, back, num_front_steps, Lk, n,
    BLKK: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Keys of a step that may be ragged, and which of them are there: the first LAST steps take what is left of the
    list from `rest` on; with KEEP the next ones take the keys up to front_end, and then those from `back` on."""
    LAST: tl.constexpr = BLKK // BLOCK_N if BLOCK_N < BLKK else 1
    position = rest + n // BLKK
    chosen = tl.load(list_base + position, mask=position < listed, other=0)
    inner = step * BLOCK_N + n if LAST > 1 else n % BLKK
    keys = k_first + chosen * BLKK + inner
    visible = (position < listed) & (keys < k_end)
    if KEEP:
        kept_step = step - LAST
        at_front = kept_step < num_front_steps
        kept = tl.where(at_front, kept_step * BLOCK_N, back + (kept_step - num_front_steps) * BLOCK_N) + n
        keys = tl.where(kept_step < 0, keys, kept)
        visible = tl.where(kept_step < 0, visible, kept < tl.where(at_front, front_end, Lk))
    return keys, visible


@triton.jit
def exp2(x, EXACT: tl.constexpr):
    """2 ** x for x <= 128. A GPU's own is good to about 2^-22; EXACT, for float32, to 2^-24, by a Taylor series."""
    if EXACT:
        whole = tl.floor(x + 0.5)
        y = (x - whole) * 0.6931471805599453
        tail = 1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040)))
        series = 1.0 + y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * tail)))
        power = ((tl.maximum(whole, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -126.0, 0.0, series * power)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, EXACT: tl.constexpr):
    """Logarithm of x > 0; EXACT adds a Newton step."""
    y = tl.log2(x)
    if EXACT:
        y += (x * exp2(-y, EXACT) - 1.0) * 1.4426950408889634
    return y


@triton.jit
def dot_over_d(a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a [M, BLOCK_D] times b [BLOCK_D, N]. EXACT, for float32: in up to four parts of D, as tensor cores cut their
    sums off; the bound on imprecise sums, of no effect on float32, keeps Triton from making one sum of them again."""
    K: tl.constexpr = b.shape[0]
    PART: tl.constexpr = 32 if K < 128 else K // 4
    if EXACT and K > PART:
        d = tl.arange(0, K)[:, None]
        product = tl.dot(a, tl.where(d < PART, b, 0.0), input_precision=PRECISION, max_num_imprecise_acc=32)
        for first in tl.static_range(PART, K, PART):
            part = tl.where((d >= first) & (d < first + PART), b, 0.0)
            product += tl.dot(a, part, input_precision=PRECISION, max_num_imprecise_acc=32)
        return product
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(a, b, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a times b; EXACT adds in float32, as above."""
    if EXACT:
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=32)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _attend(
    q, k, v, visible, acc, row_sum, row_max, scale_log2,
    MASKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over a tile of keys k [N, D], v [N, D]; visible [N]. row_max: before scaling."""
    scores = dot_over_d(q, tl.trans(k), EXACT, PRECISION)  # [M, N]
    if MASKED:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    top = new_max
    if MASKED:
        top = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    if EXACT:
        p = exp2((scores - top[:, None]) * scale_log2, EXACT)
        rescale = exp2((row_max - top) * scale_log2, EXACT)
    else:
        top = top * scale_log2
        p = exp2(scores * scale_log2 - top[:, None], EXACT)
        rescale = exp2(row_max * scale_log2 - top, EXACT)
    acc = add_dot(p.to(v.dtype), v, acc * rescale[:, None], EXACT, PRECISION)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=["Lq", "Lk", "q_first", "q_end", "k_first", "k_end", "num_front", "num_kept", "num_q_blocks", "M_BLOCKS", "topk", "eps"])  # fmt: skip  # noqa: E501
def _sparse_fwd_kernel(
    q_ptr, k_ptr, v_ptr, fq_ptr, indices_ptr, mask_ptr, m_ptr, z_ptr, a_ptr, bias_ptr, o_ptr, o_s_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_fb, stride_fh, stride_fl, stride_ob, stride_oh, stride_ol,
    H, M_BLOCKS, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_q_blocks, num_rows,
    topk, scale_log2, eps,
    GROUP: tl.constexpr, M_GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLKQ: tl.constexpr, BLKK: tl.constexpr, PHI: tl.constexpr, NUM_HALVES: tl.constexpr, NEGATIVE: tl.constexpr,
    HAS_MASK: tl.constexpr, KEEP_Q: tl.constexpr, KEEP_K: tl.constexpr,
    HAS_LINEAR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_A: tl.constexpr, SAVE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head: a query block, or a part of one.

    Grid: (num_kept + num_q_blocks * BLKQ // BLOCK_M, H, B); the first num_kept programs take the kept queries, over
    every key.
    indices: [B, H, num_q_blocks, topk] int32. mask: [B, Lk] bool. a: [D, D], bias: [D].
    m: [B, H // M_GROUP, M_BLOCKS, NUM_HALVES * D, D] and z [.., NUM_HALVES * D] float32: the linear branch's sums, m
    already times W^T; M_BLOCKS is 1 or num_q_blocks. o: [B, H, Lq, D], strides o; o_s: the same,
    contiguous. lse: [B, H, num_rows] float32, base 2; EXACT: [2, B, H, num_rows], the logarithm of the sum, and the
    largest score it is of.
    scale_log2 is not negative; NEGATIVE turns the sign of q instead.
    """
    pid = tl.program_id(0)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    bh = b * H + h
    h_kv = h // GROUP
    cols = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    is_kept = pid < num_kept
    block = (pid - num_kept) // (BLKQ // BLOCK_M)
    row = q_first + (pid - num_kept) * BLOCK_M
    row_end = q_end
    if KEEP_Q:
        if is_kept:
            in_front = pid < num_front
            row = tl.where(in_front, pid * BLOCK_M, q_end + (pid - num_front) * BLOCK_M)
            row_end = tl.where(in_front, q_first, Lq)
    rows = row + tl.arange(0, BLOCK_M)
    row_valid = rows < row_end
    inside = row_valid[:, None] & (cols[None, :] < D)
    q_offsets = b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_ql + cols[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside, other=0.0)
    x = q
    if NEGATIVE:
        q = -q

    k_base = k_ptr + b * stride_kb + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + h_kv * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    PER_STEP: tl.constexpr = BLOCK_N // BLKK if BLOCK_N > BLKK else 1
    LAST: tl.constexpr = BLKK // BLOCK_N if BLOCK_N < BLKK else 1
    listed = topk
    if KEEP_Q:
        listed = tl.where(is_kept, 0, topk)
    list_base = indices_ptr + (bh * num_q_blocks + block) * topk
    rest = num_listed_whole(list_base, listed, k_first, k_end, BLKK, BLOCK_N)
    num_whole = rest // PER_STEP * LAST
    chosen = listed_block(list_base, 0, num_whole > 0, n, BLKK, BLOCK_N)
    for step in range(0, num_whole):
        first, inner = chosen.to(tl.int64) * BLKK, place_in_block(step, n, BLKK, BLOCK_N)
        chosen = listed_block(list_base, step + 1, step + 1 < num_whole, n, BLKK, BLOCK_N)
        visible = n >= 0
        if HAS_MASK:
            visible = tl.load(mask_ptr + b * Lk + k_first + first + inner) != 0
        k, v = k_base + k_first.to(tl.int64) * stride_kl, v_base + k_first.to(tl.int64) * stride_vl
        k = load_rows(k, first, inner, stride_kl, cols, visible, D, BLOCK_D, BLKK, BLOCK_N, HAS_MASK)
        v = load_rows(v, first, inner, stride_vl, cols, visible, D, BLOCK_D, BLKK, BLOCK_N, HAS_MASK)
        acc, row_sum, row_max = _attend(
            q, k, v, visible, acc, row_sum, row_max, scale_log2, HAS_MASK, EXACT, PRECISION
        )
    KEEP: tl.constexpr = KEEP_Q or KEEP_K
    front_end = k_first
    back = k_end
    if KEEP_Q:  # for kept queries the first range is every key
        front_end = tl.where(is_kept, Lk, k_first)
        back = tl.where(is_kept, Lk, k_end)
    num_front_steps = tl.cdiv(front_end, BLOCK_N)
    num_steps = tl.where(rest < listed, LAST, 0)
    if KEEP:
        num_steps = LAST + num_front_steps + tl.cdiv(Lk - back, BLOCK_N)
    for step in range(0, num_steps):
        keys, visible = masked_keys(
            step, list_base, rest, listed, k_first, k_end, front_end, back, num_front_steps, Lk, n, BLKK, BLOCK_N, KEEP
        )
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + b * Lk + keys, mask=visible, other=0) != 0)
        at = keys.to(tl.int64)[:, None]
        load = visible[:, None] & (cols[None, :] < D)
        k = tl.load(k_base + at * stride_kl + cols[None, :], mask=load, other=0.0)
        v = tl.load(v_base + at * stride_vl + cols[None, :], mask=load, other=0.0)
        acc, row_sum, row_max = _attend(q, k, v, visible, acc, row_sum, row_max, scale_log2, True, EXACT, PRECISION)

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    o_offsets = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ol + cols[None, :]
    o_s_base = (bh * Lq + rows)[:, None] * D
    if SAVE:
        lse = log2(row_sum, EXACT)
        if EXACT:
            maxima = lse_ptr + tl.num_programs(2).to(tl.int64) * H * num_rows
            top = tl.where(empty, 0.0, -row_max if NEGATIVE else row_max)
            tl.store(maxima + bh * num_rows + rows, top, mask=row_valid)
        else:
            lse += row_max * scale_log2
        lse = tl.where(empty, float("inf"), lse)
        if KEEP_Q:
            tl.store(lse_ptr + bh * num_rows + rows, lse, mask=row_valid)
        else:  # the rows that fill up the last block, too: p = 0 in the backward
            tl.store(lse_ptr + bh * num_rows + rows, tl.where(row_valid, lse, float("inf")))
    WHOLE: tl.constexpr = BLOCK_R == BLOCK_D  # a whole [D, D] matrix at once, or row by row of tiles
    if SAVE or (HAS_A and not WHOLE):
        tl.store(o_s_ptr + o_s_base + cols[None, :], acc.to(o_s_ptr.dtype.element_ty), mask=inside)
    o = acc
    if not is_kept:
        r = tl.arange(0, BLOCK_R)
        if HAS_A:
            o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            o_s = acc.to(o_ptr.dtype.element_ty)
            if not WHOLE:
                tl.debug_barrier()  # the tiles below are read back from what this program just stored
            for first in tl.static_range(0, D, BLOCK_R):
                part = first + r
                if not WHOLE:
                    o_s = tl.load(o_s_ptr + o_s_base + part[None, :], mask=row_valid[:, None] & (part[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
                a = tl.load(a_ptr + cols[None, :] * D + part[:, None], mask=(cols[None, :] < D) & (part[:, None] < D), other=0.0)  # fmt: skip  # noqa: E501
                o = add_dot(o_s, a.to(o_s.dtype), o, EXACT, PRECISION)
        if HAS_LINEAR:
            f_base = q_ptr + b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_ql
            if PHI == "hedgehog":
                f_base = fq_ptr + b * stride_fb + h * stride_fh + rows.to(tl.int64)[:, None] * stride_fl
                x = tl.load(f_base + cols[None, :], mask=inside, other=0.0)
            x_part = x.to(tl.float32)
            top, total = phi_stats(x_part, cols[None, :] < D, PHI)
            m_head = b * (H // M_GROUP) + h // M_GROUP
            m_at = m_head * M_BLOCKS + tl.where(M_BLOCKS == 1, 0, block)
            y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            den = tl.zeros([BLOCK_M], tl.float32)
            for half in tl.static_range(NUM_HALVES):
                for first in tl.static_range(0, D, BLOCK_R):
                    part = first + r
                    if not WHOLE:
                        x_part = tl.load(f_base + part[None, :], mask=row_valid[:, None] & (part[None, :] < D), other=0.0).to(tl.float32)  # fmt: skip  # noqa: E501
                    f = phi_tile(x_part, top, part[None, :] < D, PHI, half)
                    feature = (m_at * NUM_HALVES + half) * D + part
                    z = tl.load(z_ptr + feature, mask=part < D, other=0.0)
                    m = tl.load(m_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
                    den += tl.sum(f * z[None, :], 1)
                    y = add_dot(f.to(m.dtype), m, y, EXACT, PRECISION)
            o += y * (1.0 / (den + eps * total))[:, None]
        if HAS_BIAS:
            o += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=inside)


def num_rows(Lq, blkq):
    """Length of the rows' statistics lse and delta: whole query blocks."""
    return (Lq + blkq - 1) // blkq * blkq


def statistics(dtype):
    """How many statistics the forward leaves of a row: float32 would lose its last bits in one."""
    return 2 if dtype == torch.float32 else 1


def sparse_fwd(run, q, k, v, fq, indices, key_mask, m, z, a, bias, o, o_s, lse, blkq, blkk, keep_q, keep_k, feature_map, scale, eps):  # fmt: skip  # noqa: E501
    """Launch the forward. Fills o, and o_s (contiguous) and lse where they are given."""
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    num_q_blocks, topk = indices.shape[2:]
    usual = key_mask is None and a is None and feature_map != "hedgehog" and scale >= 0 and blkq >= 64 == blkk
    if usual and all(map(aligned, (q, k, v))) and takes_gluon(q):
        from .hopper import hopper_fwd

        hopper_fwd(run, q, k, v, indices, m, z, bias, o, o_s, lse, blkq, keep_q, keep_k, feature_map, scale, eps)
        return
    config = forward_config(q, blkq, blkk)
    BLOCK_D = block_d(D)
    save = o_s is not None
    if a is not None and config.block_r < BLOCK_D and not save:
        o_s = run.empty(o.shape, o.dtype)
    BLOCK_M = config.block_m
    num_front, num_back = cdiv(keep_q[0], BLOCK_M), cdiv(keep_q[1], BLOCK_M)
    num_kept = num_front + num_back
    fq = q if fq is None else fq
    linear = m is not None
    run.launch(
        _sparse_fwd_kernel, (num_kept + num_q_blocks * (blkq // BLOCK_M), H, B),
        q, k, v, fq, indices, key_mask, m, z, a, bias, o, o_s, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *fq.stride()[:3], *o.stride()[:3],
        H, m.shape[2] if linear else 1,
        Lq, Lk, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1], num_front, num_kept, num_q_blocks,
        num_rows(Lq, blkq), topk,
        max(abs(scale) * math.log2(math.e), 1e-30), eps,  # never 0: it multiplies -inf
        GROUP=H // Hkv, M_GROUP=H // m.shape[1] if linear else 1,
        D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=config.block_n, BLOCK_R=min(config.block_r, BLOCK_D),
        BLKQ=blkq, BLKK=blkk, PHI=feature_map, NUM_HALVES=HALVES[feature_map], NEGATIVE=scale < 0,
        HAS_MASK=key_mask is not None, KEEP_Q=num_kept > 0, KEEP_K=sum(keep_k) > 0,
        HAS_LINEAR=linear, HAS_BIAS=bias is not None, HAS_A=a is not None, SAVE=save, EXACT=q.dtype == torch.float32,
        PRECISION=sparse_precision(q),
        **config.options,
    )  # fmt: skip
