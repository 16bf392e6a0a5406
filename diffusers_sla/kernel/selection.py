"""Which key blocks each query block keeps: pooled means, scores, top-k; and the inverse list the backward walks.

`prepare` reads q, k and v once: it pools q and k per block and, in the same pass, sums phi(K)^T V for the linear
branch. `select` never holds more than a few rows of scores.
"""

import torch
import triton
import triton.language as tl

from .features import HALVES, phi_stats, phi_tile
from .launch import PRECISION, block_d, prepare_config, select_config


@triton.jit
def _pool_queries(
    pid, q_ptr, q_mean_ptr, stride_qb, stride_qh, stride_ql, H, q_first, q_end, num_q_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLKQ: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    block = pid % num_q_blocks
    bh = (pid // num_q_blocks).to(tl.int64)
    rows = q_first + block * BLKQ + tl.arange(0, BLKQ)
    ptrs = q_ptr + (bh // H) * stride_qb + (bh % H) * stride_qh + rows.to(tl.int64)[:, None] * stride_ql
    x = tl.load(ptrs + cols[None, :], mask=(rows[:, None] < q_end) & (cols[None, :] < D), other=0.0)
    count = tl.minimum(q_end - (q_first + block * BLKQ), BLKQ)
    tl.store(q_mean_ptr + pid.to(tl.int64) * D + cols, tl.sum(x.to(tl.float32), 0) / count, mask=cols < D)


@triton.jit
def _sum_keys(
    pid, k_ptr, v_ptr, fk_ptr, mask_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_fb, stride_fh, stride_fl,
    Hkv, Lk, k_first, k_end, num_k_blocks, num_chunks, blocks_per_chunk, norm,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLKK: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LINEAR: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    NUM_C: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    c = pid % NUM_C
    half = (pid // NUM_C) % NUM_HALVES
    chunk = (pid // (NUM_C * NUM_HALVES)) % num_chunks
    bh = (pid // (NUM_C * NUM_HALVES * num_chunks)).to(tl.int64)
    b = bh // Hkv
    h = bh % Hkv
    c_cols = c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    first_block = chunk * blocks_per_chunk
    for j in range(first_block, tl.minimum(first_block + blocks_per_chunk, num_k_blocks)):
        rows = k_first + j * BLKK + tl.arange(0, BLKK)
        valid = rows < k_end
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * Lk + rows, mask=valid, other=0) != 0)
        inside = valid[:, None] & (cols[None, :] < D)
        offsets = rows.to(tl.int64)[:, None]
        x = tl.load(k_ptr + b * stride_kb + h * stride_kh + offsets * stride_kl + cols[None, :], mask=inside, other=0.0)  # fmt: skip  # noqa: E501
        if POOL:
            if (c == 0) & (half == 0):
                count = tl.sum(valid.to(tl.int32), 0)
                mean = tl.sum(x.to(tl.float32), 0) / tl.maximum(count, 1)
                at = bh * num_k_blocks + j
                tl.store(k_mean_ptr + at * D + cols, mean, mask=cols < D)
                if HAS_MASK:
                    tl.store(k_bias_ptr + at, tl.where(count == 0, float("-inf"), 0.0))
        if HAS_LINEAR:
            v = tl.load(
                v_ptr + b * stride_vb + h * stride_vh + offsets * stride_vl + c_cols[None, :],
                mask=valid[:, None] & (c_cols[None, :] < D), other=0.0,
            )  # fmt: skip
            y = x
            if PHI == "hedgehog":
                y = tl.load(fk_ptr + b * stride_fb + h * stride_fh + offsets * stride_fl + cols[None, :], mask=inside, other=0.0)  # fmt: skip  # noqa: E501
            y = y.to(tl.float32)
            top, total = phi_stats(y, cols[None, :] < D, PHI)
            f = phi_tile(y, top, total, inside, PHI, 0)
            if NUM_HALVES == 2:
                f = tl.where(half == 0, f, phi_tile(y, top, total, inside, PHI, 1))
            acc = tl.dot(tl.trans(f).to(v.dtype), v, acc, input_precision=PRECISION)
            z += tl.sum(f, 0)
    if HAS_LINEAR:
        at = (bh * num_chunks + chunk) * NUM_HALVES + half
        ptrs = sums_ptr + (at * D + cols[:, None]) * D + c_cols[None, :]
        tl.store(ptrs, (acc * norm).to(sums_ptr.dtype.element_ty), mask=(cols[:, None] < D) & (c_cols[None, :] < D))
        if c == 0:
            tl.store(z_ptr + at * D + cols, z * norm, mask=cols < D)


@triton.jit(do_not_specialize=["Lk", "q_first", "q_end", "k_first", "k_end", "num_q_blocks", "num_k_blocks", "num_chunks", "blocks_per_chunk", "num_q_programs", "norm"])  # fmt: skip  # noqa: E501
def _prepare_kernel(
    q_ptr, k_ptr, v_ptr, fk_ptr, mask_ptr, q_mean_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_fb, stride_fh, stride_fl,
    H, Hkv, Lk, q_first, q_end, k_first, k_end, num_q_blocks, num_k_blocks,
    num_chunks, blocks_per_chunk, num_q_programs, norm,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLKQ: tl.constexpr, BLKK: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LINEAR: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The first num_q_programs programs pool one query block each, the others take one chunk of key blocks each.

    Grid: (num_q_programs + B * Hkv * num_chunks * NUM_HALVES * cdiv(D, BLOCK_C),).
    q_mean: [B, H, num_q_blocks, D], k_mean: [B, Hkv, num_k_blocks, D], k_bias: [B, Hkv, num_k_blocks], all float32;
    k_bias is -inf for a block without a valid key.
    sums: [B, Hkv, num_chunks, NUM_HALVES * D, D] norm * phi(K)^T V; z: its float32 row sums of phi(K).
    """
    pid = tl.program_id(0)
    if pid < num_q_programs:
        if POOL:
            _pool_queries(
                pid, q_ptr, q_mean_ptr, stride_qb, stride_qh, stride_ql,
                H, q_first, q_end, num_q_blocks, D, BLOCK_D, BLKQ,
            )  # fmt: skip
    else:
        _sum_keys(
            pid - num_q_programs, k_ptr, v_ptr, fk_ptr, mask_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_fb, stride_fh, stride_fl,
            Hkv, Lk, k_first, k_end, num_k_blocks, num_chunks, blocks_per_chunk, norm,
            D, BLOCK_D, BLOCK_C, BLKK, PHI, NUM_HALVES, HAS_MASK, HAS_LINEAR, POOL, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_groups", "groups_per_head", "num_q_blocks", "num_k_blocks", "topk", "num_unskipped", "scale"])  # fmt: skip  # noqa: E501
def _select_kernel(
    q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
    H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, topk, num_unskipped, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program takes groups of ROWS query blocks in turn: scores, the topk-th largest by bisection, the list.

    Grid: (any,). scratch: [grid, ROWS, num_k_blocks] uint32, one program's scores in an order-preserving encoding.
    indices: [B, H, num_q_blocks, topk] int32 ascending; map: [B, H, num_q_blocks, num_k_blocks] int8 (eq. 3).
    Ties go to the lower index.
    """
    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    scratch = scratch_ptr + (tl.program_id(0).to(tl.int64) * ROWS + r)[:, None] * num_k_blocks
    for group in range(tl.program_id(0), num_groups, tl.num_programs(0)):
        bh = (group // groups_per_head).to(tl.int64)
        rows = (group % groups_per_head) * ROWS + r
        row_valid = rows < num_q_blocks
        bh_kv = (bh // H) * Hkv + (bh % H) // (H // Hkv)
        q = tl.load(
            q_mean_ptr + (bh * num_q_blocks + rows)[:, None] * D + d[None, :],
            mask=row_valid[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, num_k_blocks, BLOCK_N):
            j = start + n
            k = tl.load(
                k_mean_ptr + (bh_kv * num_k_blocks + j)[:, None] * D + d[None, :],
                mask=(j[:, None] < num_k_blocks) & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if HAS_MASK:
                scores += tl.load(k_bias_ptr + bh_kv * num_k_blocks + j, mask=j < num_k_blocks, other=0.0)[None, :]
            bits = scores.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)
            tl.store(scratch + j[None, :], key, mask=j[None, :] < num_k_blocks)
        tl.debug_barrier()

        cut = _nth_largest(scratch, n, num_k_blocks, topk, ROWS, BLOCK_N)
        ties = topk - _count_above(scratch, n, num_k_blocks, cut, ROWS, BLOCK_N)
        if HAS_SKIP:
            low_cut = _nth_largest(scratch, n, num_k_blocks, num_unskipped, ROWS, BLOCK_N)
            low_ties = num_unskipped - _count_above(scratch, n, num_k_blocks, low_cut, ROWS, BLOCK_N)
        equal_seen = tl.zeros([ROWS], tl.int32)
        low_equal_seen = tl.zeros([ROWS], tl.int32)
        written = tl.zeros([ROWS], tl.int32)
        at = bh * num_q_blocks + rows
        for start in range(0, num_k_blocks, BLOCK_N):
            j = start + n
            inside = j[None, :] < num_k_blocks
            key = tl.load(scratch + j[None, :], mask=inside, other=0)
            equal = ((key == cut[:, None]) & inside).to(tl.int32)
            rank = equal_seen[:, None] + tl.cumsum(equal, 1)
            critical = inside & ((key > cut[:, None]) | ((equal != 0) & (rank <= ties[:, None])))
            equal_seen += tl.sum(equal, 1)
            chosen = critical.to(tl.int32)
            position = written[:, None] + tl.cumsum(chosen, 1) - 1
            written += tl.sum(chosen, 1)
            store = critical & row_valid[:, None]
            tl.store(indices_ptr + at[:, None] * topk + position, tl.broadcast_to(j[None, :], [ROWS, BLOCK_N]), mask=store)  # fmt: skip  # noqa: E501
            value = chosen
            if HAS_SKIP:
                low_equal = ((key == low_cut[:, None]) & inside).to(tl.int32)
                low_rank = low_equal_seen[:, None] + tl.cumsum(low_equal, 1)
                low_equal_seen += tl.sum(low_equal, 1)
                kept = (key > low_cut[:, None]) | ((low_equal != 0) & (low_rank <= low_ties[:, None]))
                value = tl.where(kept, chosen, -1)
            tl.store(map_ptr + at[:, None] * num_k_blocks + j[None, :], value.to(tl.int8), mask=inside & row_valid[:, None])  # fmt: skip  # noqa: E501


@triton.jit
def _nth_largest(scratch, n, num_k_blocks, count, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Per row the `count`-th largest key: [ROWS] uint32, found bit by bit from the top."""
    cut = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 1, tl.uint32) << 31
    for _ in range(32):
        candidate = cut | bit
        at_least = tl.zeros([ROWS], tl.int32)
        for start in range(0, num_k_blocks, BLOCK_N):
            inside = (start + n)[None, :] < num_k_blocks
            key = tl.load(scratch + (start + n)[None, :], mask=inside, other=0)
            at_least += tl.sum((inside & (key >= candidate[:, None])).to(tl.int32), 1)
        cut = tl.where(at_least >= count, candidate, cut)
        bit = bit >> 1
    return cut


@triton.jit
def _count_above(scratch, n, num_k_blocks, cut, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    above = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_k_blocks, BLOCK_N):
        inside = (start + n)[None, :] < num_k_blocks
        key = tl.load(scratch + (start + n)[None, :], mask=inside, other=0)
        above += tl.sum((inside & (key > cut[:, None])).to(tl.int32), 1)
    return above


@triton.jit(do_not_specialize=["num_q_blocks", "num_k_blocks", "total"])
def _invert_kernel(
    map_ptr, offsets_ptr, list_ptr, num_q_blocks, num_k_blocks, total,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COUNT: offsets[bh, j + 1] = number of query blocks that chose key block j. Otherwise: list them, ascending.

    Grid: (cdiv(num_k_blocks, COLS), B * H). offsets: [B * H, num_k_blocks + 1] int32, cumulated in between;
    list: [B * H, total] int32.
    """
    bh = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    seen = tl.zeros([COLS], tl.int32)
    if not COUNT:
        base = tl.load(offsets_ptr + bh * (num_k_blocks + 1) + j, mask=j < num_k_blocks, other=0)
    for start in range(0, num_q_blocks, ROWS):
        i = start + tl.arange(0, ROWS)
        inside = (i[:, None] < num_q_blocks) & (j[None, :] < num_k_blocks)
        at = (bh * num_q_blocks + i)[:, None] * num_k_blocks + j[None, :]
        chosen = (tl.load(map_ptr + at, mask=inside, other=0) == 1).to(tl.int32)
        if not COUNT:
            position = base[None, :] + seen[None, :] + tl.cumsum(chosen, 0) - 1
            tl.store(list_ptr + bh * total + position, tl.broadcast_to(i[:, None], [ROWS, COLS]), mask=chosen != 0)
        seen += tl.sum(chosen, 0)
    if COUNT:
        tl.store(offsets_ptr + bh * (num_k_blocks + 1) + j + 1, seen, mask=j < num_k_blocks)


def prepare(q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, pool, norm):
    """Launch the pass over q, k, v. Returns q_mean, k_mean, k_bias (None: not pooled), sums, z (None: no linear).

    linear: "all" gives sums per chunk of key blocks, "marginal" per key block in q's dtype, "none" nothing.
    """
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    num_q_blocks = triton.cdiv(Lq - sum(keep_q), blkq)
    num_k_blocks = triton.cdiv(Lk - sum(keep_k), blkk)
    halves = HALVES[feature_map]
    config = prepare_config(q, feature_map)
    if linear == "all":
        num_chunks = max(1, min(num_k_blocks, config.programs // (B * Hkv)))
        blocks_per_chunk = triton.cdiv(num_k_blocks, num_chunks)
        num_chunks = triton.cdiv(num_k_blocks, blocks_per_chunk)
    else:
        num_chunks, blocks_per_chunk = num_k_blocks, 1
    new = dict(device=q.device, dtype=torch.float32)
    q_mean = torch.empty((B, H, num_q_blocks, D), **new) if pool else None
    k_mean = torch.empty((B, Hkv, num_k_blocks, D), **new) if pool else None
    k_bias = torch.empty((B, Hkv, num_k_blocks), **new) if pool and key_mask is not None else None
    sums = z = None
    if linear != "none":
        dtype = torch.float32 if linear == "all" else q.dtype
        sums = torch.empty((B, Hkv, num_chunks, halves * D, D), device=q.device, dtype=dtype)
        z = torch.empty((B, Hkv, num_chunks, halves * D), **new)
    elif not pool:
        return None, None, None, None, None
    num_q_programs = B * H * num_q_blocks if pool else 0
    parts = halves * triton.cdiv(D, config.block_c) if linear != "none" else 1
    fk = k if fk is None else fk
    _prepare_kernel[(num_q_programs + B * Hkv * num_chunks * parts,)](
        q, k, v, fk, key_mask, q_mean, k_mean, k_bias, sums, z,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *fk.stride()[:3],
        H, Hkv, Lk, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1], num_q_blocks, num_k_blocks,
        num_chunks, blocks_per_chunk, num_q_programs, norm,
        D=D, BLOCK_D=block_d(D), BLOCK_C=config.block_c if linear != "none" else block_d(D), BLKQ=blkq, BLKK=blkk,
        PHI=feature_map, NUM_HALVES=halves if linear != "none" else 1, HAS_MASK=key_mask is not None,
        HAS_LINEAR=linear != "none", POOL=pool, PRECISION=PRECISION,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return q_mean, k_mean, k_bias, sums, z


def select(q_mean, k_mean, k_bias, topk, skip, scale):
    """Launch the choice. Returns indices [B, H, num_q_blocks, n] int32 and the int8 block map."""
    B, H, num_q_blocks, D = q_mean.shape
    Hkv, num_k_blocks = k_mean.shape[1:3]
    n = max(1, int(topk * num_k_blocks))
    num_skipped = int(skip * num_k_blocks)
    config = select_config(q_mean)
    groups_per_head = triton.cdiv(num_q_blocks, config.rows)
    num_groups = B * H * groups_per_head
    programs = min(num_groups, config.programs)
    scratch = torch.empty((programs, config.rows, num_k_blocks), device=q_mean.device, dtype=torch.int32)
    indices = torch.empty((B, H, num_q_blocks, n), device=q_mean.device, dtype=torch.int32)
    block_map = torch.empty((B, H, num_q_blocks, num_k_blocks), device=q_mean.device, dtype=torch.int8)
    _select_kernel[(programs,)](
        q_mean, k_mean, k_bias, scratch.view(torch.uint32), indices, block_map,
        H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, n, num_k_blocks - num_skipped, scale,
        D=D, BLOCK_D=block_d(D), ROWS=config.rows, BLOCK_N=config.block_n,
        HAS_MASK=k_bias is not None, HAS_SKIP=num_skipped > 0, PRECISION=PRECISION,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return indices, block_map


def indices_of(block_map, topk):
    """Ascending indices [B, H, num_q_blocks, n] int32 of the critical blocks of a given map."""
    n = max(1, int(topk * block_map.shape[-1]))
    order = (block_map != 1).to(torch.int8).argsort(dim=-1, stable=True)
    return order[..., :n].to(torch.int32).contiguous()


def invert(block_map, topk):
    """Per key block the query blocks that chose it: offsets [B * H, num_k_blocks + 1], list [B * H, total], int32."""
    B, H, num_q_blocks, num_k_blocks = block_map.shape
    total = num_q_blocks * max(1, int(topk * num_k_blocks))
    counts = torch.empty((B * H, num_k_blocks + 1), device=block_map.device, dtype=torch.int32)
    listed = torch.empty((B * H, total), device=block_map.device, dtype=torch.int32)
    grid = (triton.cdiv(num_k_blocks, 32), B * H)
    sizes = (num_q_blocks, num_k_blocks, total)
    _invert_kernel[grid](block_map, counts, listed, *sizes, COUNT=True, ROWS=64, COLS=32)
    counts[:, 0] = 0
    offsets = counts.cumsum(1, dtype=torch.int32)
    _invert_kernel[grid](block_map, offsets, listed, *sizes, COUNT=False, ROWS=64, COLS=32)
    return offsets, listed
