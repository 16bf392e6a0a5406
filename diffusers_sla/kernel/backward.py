"""The sparse branch backward: dQ over the selected list, dK and dV over the inverse list. No atomics."""

import math

import torch
import triton
import triton.language as tl

from .forward import (
    add_dot,
    dot_over_d,
    exp2,
    listed_block,
    load_rows,
    masked_keys,
    num_listed_whole,
    num_rows,
    place_in_block,
)
from .launch import block_d, cdiv, dkdv_config, dq_config, sparse_precision
from .selection import invert

INVERTED = tl.constexpr(32)  # key blocks a program


@triton.jit
def _dq_step(
    q, do, k, v, visible, lse, top, delta, dq, scale_log2, FIRST: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over a tile of keys: adds to delta in the FIRST of two turns, else to dq."""
    scores = dot_over_d(q, tl.trans(k), EXACT, PRECISION)
    if EXACT:
        scores -= top[:, None]
    p = exp2(scores * scale_log2 - lse[:, None], EXACT)
    if MASKED:
        p = tl.where(visible[None, :], p, 0.0)
    dp = dot_over_d(do, tl.trans(v), EXACT, PRECISION)
    if FIRST:
        delta += tl.sum(p * dp, 1)
    else:
        ds = p * (dp - delta[:, None])
        dq = add_dot(ds.to(k.dtype), k, dq, EXACT, PRECISION)
    return delta, dq


@triton.jit
def _query_gradients(
    pid, q_ptr, k_ptr, v_ptr, do_ptr, o_s_ptr, indices_ptr, mask_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
    H, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_q_blocks, num_rows, topk,
    scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLKQ: tl.constexpr, BLKK: tl.constexpr,
    HAS_MASK: tl.constexpr, KEEP_Q: tl.constexpr, KEEP_K: tl.constexpr, HAS_LINEAR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries over their key blocks, and delta = rowsum(dO_s * O_s).

    EXACT sums delta over the very products P dP from which it is then subtracted, at the price of a turn more: where
    one key has nearly all the weight, little but their rounding is left of the difference.
    """
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
    at = rows.to(tl.int64)[:, None]
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + at * stride_ql + cols[None, :], mask=inside, other=0.0)
    do = tl.load(do_ptr + b * stride_db + h * stride_dh + at * stride_dl + cols[None, :], mask=inside, other=0.0)
    if EXACT:
        delta = tl.zeros([BLOCK_M], tl.float32)
    else:
        o_s = tl.load(o_s_ptr + (bh * Lq + at) * D + cols[None, :], mask=inside, other=0.0)
        delta = tl.sum(do.to(tl.float32) * o_s.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh * num_rows + rows, mask=row_valid, other=float("inf"))
    top = lse
    if EXACT:
        maxima = lse_ptr + tl.num_programs(2).to(tl.int64) * H * num_rows
        top = tl.load(maxima + bh * num_rows + rows, mask=row_valid, other=0.0)

    k_base = k_ptr + b * stride_kb + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + h_kv * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    PER_STEP: tl.constexpr = BLOCK_N // BLKK if BLOCK_N > BLKK else 1
    LAST: tl.constexpr = BLKK // BLOCK_N if BLOCK_N < BLKK else 1
    listed = topk
    if KEEP_Q:
        listed = tl.where(is_kept, 0, topk)
    list_base = indices_ptr + (bh * num_q_blocks + block) * topk
    rest = num_listed_whole(list_base, listed, k_first, k_end, BLKK, BLOCK_N)
    num_whole = rest // PER_STEP * LAST
    KEEP: tl.constexpr = KEEP_Q or KEEP_K
    front_end = k_first
    back = k_end
    if KEEP_Q:
        front_end = tl.where(is_kept, Lk, k_first)
        back = tl.where(is_kept, Lk, k_end)
    num_front_steps = tl.cdiv(front_end, BLOCK_N)
    num_steps = tl.where(rest < listed, LAST, 0)
    if KEEP:
        num_steps = LAST + num_front_steps + tl.cdiv(Lk - back, BLOCK_N)
    for turn in tl.static_range(EXACT + 1):
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
            delta, dq = _dq_step(
                q, do, k, v, visible, lse, top, delta, dq, scale_log2, turn < EXACT, HAS_MASK, EXACT, PRECISION
            )
        for step in range(0, num_steps):
            keys, visible = masked_keys(
                step, list_base, rest, listed, k_first, k_end, front_end, back, num_front_steps, Lk, n,
                BLKK, BLOCK_N, KEEP,
            )  # fmt: skip
            if HAS_MASK:
                visible = visible & (tl.load(mask_ptr + b * Lk + keys, mask=visible, other=0) != 0)
            offsets = keys.to(tl.int64)[:, None]
            load = visible[:, None] & (cols[None, :] < D)
            k = tl.load(k_base + offsets * stride_kl + cols[None, :], mask=load, other=0.0)
            v = tl.load(v_base + offsets * stride_vl + cols[None, :], mask=load, other=0.0)
            delta, dq = _dq_step(
                q, do, k, v, visible, lse, top, delta, dq, scale_log2, turn < EXACT, True, EXACT, PRECISION
            )
    if KEEP_Q:
        tl.store(delta_ptr + bh * num_rows + rows, delta, mask=row_valid)
    else:
        tl.store(delta_ptr + bh * num_rows + rows, delta)

    dq *= scale
    dq_ptrs = dq_ptr + b * stride_gb + h * stride_gh + at * stride_gl + cols[None, :]
    if HAS_LINEAR:
        dq += tl.load(dq_ptrs, mask=inside & (pid >= num_kept), other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Lq", "Lk", "q_first", "q_end", "k_first", "k_end", "num_front", "num_kept", "num_q_blocks", "topk", "num_inverting", "num_k_blocks"])  # fmt: skip  # noqa: E501
def _sparse_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_s_ptr, indices_ptr, mask_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
    H, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_q_blocks, num_rows, topk,
    scale, scale_log2,
    map_ptr, starts_ptr, counts_ptr, list_ptr, num_inverting, num_k_blocks,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLKQ: tl.constexpr, BLKK: tl.constexpr,
    HAS_MASK: tl.constexpr, KEEP_Q: tl.constexpr, KEEP_K: tl.constexpr, HAS_LINEAR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries a program; the first num_inverting programs make the inverse list that dK and dV walk.

    Grid: (num_inverting + num_kept + num_q_blocks * BLKQ // BLOCK_M, H, B), the others as in the forward. dq:
    strides g, and the linear branch's share of the queries in blocks when HAS_LINEAR. o_s, lse: from the forward.
    delta: [B, H, num_rows] float32. map: [B, H, num_q_blocks, num_k_blocks] int8; the rest as in `invert`.
    """
    pid = tl.program_id(0)
    if pid < num_inverting:
        bh = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
        invert(
            pid, bh, map_ptr, indices_ptr, starts_ptr, counts_ptr, list_ptr, num_q_blocks, num_k_blocks, topk,
            64, INVERTED,
        )  # fmt: skip
    else:
        _query_gradients(
            pid - num_inverting,
            q_ptr, k_ptr, v_ptr, do_ptr, o_s_ptr, indices_ptr, mask_ptr, lse_ptr, delta_ptr, dq_ptr,
            stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
            H, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_q_blocks, num_rows, topk,
            scale, scale_log2,
            GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, BLKQ, BLKK, HAS_MASK, KEEP_Q, KEEP_K, HAS_LINEAR, EXACT, PRECISION,
        )  # fmt: skip


@triton.jit
def _dkdv_step(
    q, do, lse, top, delta, k, v, visible, dk, dv, scale_log2,
    MASKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over a tile of queries."""
    scores = dot_over_d(k, tl.trans(q), EXACT, PRECISION)  # [N, M]
    if EXACT:
        scores -= top[None, :]
    p = exp2(scores * scale_log2 - lse[None, :], EXACT)
    if MASKED:
        p = tl.where(visible[:, None], p, 0.0)
    dv = add_dot(p.to(do.dtype), do, dv, EXACT, PRECISION)
    dp = dot_over_d(v, tl.trans(do), EXACT, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = add_dot(ds.to(q.dtype), q, dk, EXACT, PRECISION)
    return dk, dv


@triton.jit
def _any_queries_step(
    q_base, do_base, lse_base, maxima, delta_base, rows, row_valid, stride_ql, stride_dl, cols,
    k, v, visible, dk, dv, scale_log2,
    D: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over any rows. What is not valid has lse = inf, hence p = 0."""
    load = row_valid[:, None] & (cols[None, :] < D)
    at = rows.to(tl.int64)[:, None]
    q = tl.load(q_base + at * stride_ql + cols[None, :], mask=load, other=0.0)
    do = tl.load(do_base + at * stride_dl + cols[None, :], mask=load, other=0.0)
    lse = tl.load(lse_base + rows, mask=row_valid, other=float("inf"))
    top = lse
    if EXACT:
        top = tl.load(maxima + rows, mask=row_valid, other=0.0)
    delta = tl.load(delta_base + rows, mask=row_valid, other=0.0)
    return _dkdv_step(q, do, lse, top, delta, k, v, visible, dk, dv, scale_log2, MASKED, EXACT, PRECISION)


@triton.jit(do_not_specialize=["Lq", "Lk", "q_first", "q_end", "k_first", "k_end", "num_front", "num_kept", "num_k_blocks", "total"])  # fmt: skip  # noqa: E501
def _sparse_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, starts_ptr, counts_ptr, list_ptr, mask_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
    H, Lq, Lk, q_first, q_end, k_first, k_end, num_front, num_kept, num_k_blocks, num_rows, total,
    scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLKQ: tl.constexpr, BLKK: tl.constexpr,
    HAS_MASK: tl.constexpr, KEEP_Q: tl.constexpr, KEEP_K: tl.constexpr, HAS_LINEAR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dK and dV of BLOCK_N keys over the query blocks that chose them, all heads of their group.

    Grid: (num_kept + num_k_blocks * BLKK // BLOCK_N, Hkv, B); the first num_kept programs take the kept keys, over
    every query.
    starts, counts: [B * H, num_k_blocks], list: [B * H, total], int32. dk, dv: strides g, and the linear branch's
    share of the keys in blocks when HAS_LINEAR. A step takes BLOCK_M queries: several blocks, or a part of one.
    """
    pid = tl.program_id(0)
    b, h_kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    is_kept = pid < num_kept
    block = (pid - num_kept) // (BLKK // BLOCK_N)
    key = k_first + (pid - num_kept) * BLOCK_N
    key_end = k_end
    if KEEP_K:
        if is_kept:
            in_front = pid < num_front
            key = tl.where(in_front, pid * BLOCK_N, k_end + (pid - num_front) * BLOCK_N)
            key_end = tl.where(in_front, k_first, Lk)
    keys = key + tl.arange(0, BLOCK_N)
    key_valid = keys < key_end
    visible = key_valid
    if HAS_MASK:
        visible = visible & (tl.load(mask_ptr + b * Lk + keys, mask=visible, other=0) != 0)
    inside = visible[:, None] & (cols[None, :] < D)
    at = keys.to(tl.int64)[:, None]
    k = tl.load(k_ptr + b * stride_kb + h_kv * stride_kh + at * stride_kl + cols[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + h_kv * stride_vh + at * stride_vl + cols[None, :], mask=inside, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    PER_STEP: tl.constexpr = BLOCK_M // BLKQ if BLOCK_M > BLKQ else 1
    STEPS: tl.constexpr = BLKQ // BLOCK_M if BLOCK_M < BLKQ else 1  # steps per block
    for g in range(0, GROUP):
        h = h_kv * GROUP + g
        bh = b * H + h
        q_base = q_ptr + b * stride_qb + h * stride_qh
        do_base = do_ptr + b * stride_db + h * stride_dh
        lse_base = lse_ptr + bh * num_rows
        maxima = lse_base + tl.num_programs(2).to(tl.int64) * H * num_rows
        delta_base = delta_ptr + bh * num_rows
        first = 0
        last = 0
        if not is_kept:
            first = tl.load(starts_ptr + bh * num_k_blocks + block)
            last = first + tl.load(counts_ptr + bh * num_k_blocks + block)
        list_base = list_ptr + bh * total
        if PER_STEP == 1:
            chosen = tl.load(list_base + first, mask=first < last, other=0)
            for step in range(first * STEPS, last * STEPS):
                row = chosen * BLKQ + step % STEPS * BLOCK_M
                chosen = tl.load(list_base + (step + 1) // STEPS, mask=step + 1 < last * STEPS, other=0)
                if KEEP_Q:
                    row += q_first
                rows = row + m
                row_valid = rows < q_end
                load = row_valid[:, None] & (cols[None, :] < D)
                q = tl.load((q_base + cols)[None, :] + (rows.to(tl.int64) * stride_ql)[:, None], mask=load, other=0.0)
                do = tl.load(
                    (do_base + cols)[None, :] + (rows.to(tl.int64) * stride_dl)[:, None], mask=load, other=0.0
                )
                if KEEP_Q:
                    lse = tl.load(lse_base + row + m, mask=row_valid, other=float("inf"))
                    delta = tl.load(delta_base + row + m, mask=row_valid, other=0.0)
                else:
                    lse = tl.load(lse_base + row + m)
                    delta = tl.load(delta_base + row + m)
                top = lse
                if EXACT:
                    top = tl.load(maxima + row + m, mask=row_valid, other=0.0)
                dk, dv = _dkdv_step(
                    q, do, lse, top, delta, k, v, visible, dk, dv, scale_log2, HAS_MASK, EXACT, PRECISION
                )
        else:
            for step in range(0, tl.cdiv(last - first, PER_STEP)):
                position = first + step * PER_STEP + m // BLKQ
                chosen = tl.load(list_base + position, mask=position < last, other=0)
                rows = q_first + chosen * BLKQ + m % BLKQ
                row_valid = (position < last) & (rows < q_end)
                dk, dv = _any_queries_step(
                    q_base, do_base, lse_base, maxima, delta_base, rows, row_valid, stride_ql, stride_dl, cols,
                    k, v, visible, dk, dv, scale_log2, D, HAS_MASK, EXACT, PRECISION,
                )  # fmt: skip
        if KEEP_Q or KEEP_K:
            front_end = q_first
            back = q_end
            if KEEP_K:
                front_end = tl.where(is_kept, Lq, q_first)
                back = tl.where(is_kept, Lq, q_end)
            num_front_steps = tl.cdiv(front_end, BLOCK_M)
            for step in range(0, num_front_steps + tl.cdiv(Lq - back, BLOCK_M)):
                at_front = step < num_front_steps
                rows = tl.where(at_front, step * BLOCK_M, back + (step - num_front_steps) * BLOCK_M) + m
                row_valid = rows < tl.where(at_front, front_end, Lq)
                dk, dv = _any_queries_step(
                    q_base, do_base, lse_base, maxima, delta_base, rows, row_valid, stride_ql, stride_dl, cols,
                    k, v, visible, dk, dv, scale_log2, D, HAS_MASK, EXACT, PRECISION,
                )  # fmt: skip

    dk *= scale
    g_offsets = b * stride_gb + h_kv * stride_gh + at * stride_gl + cols[None, :]
    stored = key_valid[:, None] & (cols[None, :] < D)
    if HAS_LINEAR:
        linear = stored & (pid >= num_kept)
        dk += tl.load(dk_ptr + g_offsets, mask=linear, other=0.0).to(tl.float32)
        dv += tl.load(dv_ptr + g_offsets, mask=linear, other=0.0).to(tl.float32)
    tl.store(dk_ptr + g_offsets, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + g_offsets, dv.to(dv_ptr.dtype.element_ty), mask=stored)


def sparse_bwd(run, do, q, k, v, o_s, lse, indices, block_map, key_mask, dq, dk, dv, blkq, blkk, keep_q, keep_k, scale, linear):  # fmt: skip  # noqa: E501
    """Launch the backward of the sparse branch; adds to what dq, dk, dv hold in blocks when `linear`, else overwrites.

    dk and dv share one order of strides; o_s is contiguous.
    """
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    num_q_blocks, topk = indices.shape[2:]
    num_k_blocks = cdiv(Lk - sum(keep_k), blkk)
    starts, counts = (run.empty((B * H, num_k_blocks), torch.int32) for _ in range(2))
    listed = run.empty((B * H, num_q_blocks * topk), torch.int32)
    inverting = cdiv(num_k_blocks, INVERTED.value)
    rows = num_rows(Lq, blkq)
    delta = run.empty((B, H, rows))
    ranges = (Lq, Lk, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    flags = dict(
        HAS_MASK=key_mask is not None, KEEP_Q=sum(keep_q) > 0, KEEP_K=sum(keep_k) > 0, HAS_LINEAR=linear,
        EXACT=q.dtype == torch.float32, PRECISION=sparse_precision(q),
    )  # fmt: skip
    scale_log2 = scale * math.log2(math.e)

    config = dq_config(q, blkq, blkk)
    front, back = cdiv(keep_q[0], config.block_m), cdiv(keep_q[1], config.block_m)
    run.launch(
        _sparse_bwd_dq_kernel, (inverting + front + back + num_q_blocks * (blkq // config.block_m), H, B),
        q, k, v, do, o_s, indices, key_mask, lse, delta, dq,
        *strides, *dq.stride()[:3],
        H, *ranges, front, front + back, num_q_blocks, rows, topk, scale, scale_log2,
        block_map, starts, counts, listed, inverting, num_k_blocks,
        GROUP=H // Hkv, D=D, BLOCK_D=block_d(D), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLKQ=blkq, BLKK=blkk, **flags,
        **config.options,
    )  # fmt: skip

    config = dkdv_config(q, blkq, blkk)
    front, back = cdiv(keep_k[0], config.block_n), cdiv(keep_k[1], config.block_n)
    run.launch(
        _sparse_bwd_dkdv_kernel, (front + back + num_k_blocks * (blkk // config.block_n), Hkv, B),
        q, k, v, do, starts, counts, listed, key_mask, lse, delta, dk, dv,
        *strides, *dk.stride()[:3],
        H, *ranges, front, front + back, num_k_blocks, rows, listed.shape[1], scale, scale_log2,
        GROUP=H // Hkv, D=D, BLOCK_D=block_d(D), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLKQ=blkq, BLKK=blkk, **flags,
        **config.options,
    )  # fmt: skip
