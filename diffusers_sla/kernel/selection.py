"""Which key blocks each query block keeps: pooled means, scores, top-k; and the inverse list the backward walks.

`prepare` reads q, k and v once: it pools q and k per block and, in the same pass, sums phi(K)^T V for the linear
branch. `select` never holds more than a few rows of scores.
"""

import torch
import triton
import triton.language as tl

from .features import HALVES, phi_stats, phi_tile
from .forward import add_dot
from .launch import PRECISION, block_d, cdiv, chunk_size, prepare_config, rounded_precision, select_config
from .linear import project, projection


@triton.jit
def _pool_queries(
    pid, q_ptr, q_mean_ptr, stride_qb, stride_qh, stride_ql, H, q_first, q_end, num_q_blocks, num_q_groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLKQ: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Means of GROUP query blocks at once."""
    cols = tl.arange(0, BLOCK_D)
    bh = (pid // num_q_groups).to(tl.int64)
    blocks = pid % num_q_groups * GROUP + tl.arange(0, GROUP)
    rows = q_first + pid % num_q_groups * (GROUP * BLKQ) + tl.arange(0, GROUP * BLKQ)
    ptrs = q_ptr + (bh // H) * stride_qb + (bh % H) * stride_qh + rows.to(tl.int64)[:, None] * stride_ql
    x = tl.load(ptrs + cols[None, :], mask=(rows[:, None] < q_end) & (cols[None, :] < D), other=0.0)
    total = tl.sum(tl.reshape(x.to(tl.float32), [GROUP, BLKQ, BLOCK_D]), 1)
    count = tl.minimum(q_end - (q_first + blocks * BLKQ), BLKQ)
    at = (bh * num_q_blocks + blocks)[:, None] * D + cols[None, :]
    tl.store(q_mean_ptr + at, total / count[:, None], mask=(blocks[:, None] < num_q_blocks) & (cols[None, :] < D))


@triton.jit
def _sum_keys(
    pid, k_ptr, v_ptr, fk_ptr, mask_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_fb, stride_fh, stride_fl,
    Hkv, Lk, k_first, k_end, num_k_blocks, num_chunks, blocks_per_chunk, norm,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLKK: tl.constexpr,
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
    pools = (c == 0) & (half == 0)  # one of the programs that share a chunk
    # Kept transposed: so the tile that comes from memory is the one that is read across.
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    z = tl.zeros([16, BLOCK_D], tl.float32)  # rows 16 apart are one thread's
    first_block = chunk * blocks_per_chunk
    for j in range(first_block, tl.minimum(first_block + blocks_per_chunk, num_k_blocks)):
        total = tl.zeros([BLOCK_D], tl.float32)
        count = 0 if HAS_MASK else tl.minimum(k_end - (k_first + j * BLKK), BLKK)
        for first in tl.static_range(0, BLKK, BLOCK_N):
            rows = k_first + j * BLKK + first + tl.arange(0, BLOCK_N)
            valid = rows < k_end
            if HAS_MASK:
                valid = valid & (tl.load(mask_ptr + b * Lk + rows, mask=valid, other=0) != 0)
                count += tl.sum(valid.to(tl.int32), 0)
            inside = valid[:, None] & (cols[None, :] < D)
            offsets = rows.to(tl.int64)[:, None]
            x = tl.load(k_ptr + b * stride_kb + h * stride_kh + offsets * stride_kl + cols[None, :], mask=inside, other=0.0)  # fmt: skip  # noqa: E501
            y = x.to(tl.float32)
            total += tl.sum(y, 0)
            if HAS_LINEAR:
                v = tl.load(
                    v_ptr + b * stride_vb + h * stride_vh + offsets * stride_vl + c_cols[None, :],
                    mask=valid[:, None] & (c_cols[None, :] < D), other=0.0,
                )  # fmt: skip
                if PHI == "hedgehog":
                    y = tl.load(fk_ptr + b * stride_fb + h * stride_fh + offsets * stride_fl + cols[None, :], mask=inside, other=0.0).to(tl.float32)  # fmt: skip  # noqa: E501
                top, inv = phi_stats(y, cols[None, :] < D, PHI)
                f = phi_tile(y, top, inv, inside, PHI, 0)
                if NUM_HALVES == 2:
                    f = tl.where(half == 0, f, phi_tile(y, top, inv, inside, PHI, 1))
                acc = add_dot(tl.trans(v), f.to(v.dtype), acc, v.dtype == tl.float32, PRECISION)
                z += tl.sum(tl.reshape(f, [BLOCK_N // 16, 16, BLOCK_D]), 0)
        if POOL:
            at = bh * num_k_blocks + j
            tl.store(k_mean_ptr + at * D + cols, total / tl.maximum(count, 1), mask=(cols < D) & pools)
            if HAS_MASK:
                tl.store(k_bias_ptr + at, tl.where(count == 0, float("-inf"), 0.0), mask=pools)
    if HAS_LINEAR:
        at = (bh * num_chunks + chunk) * NUM_HALVES + half
        ptrs = sums_ptr + (at * D + cols[:, None]) * D + c_cols[None, :]
        sums = (tl.trans(acc) * norm).to(sums_ptr.dtype.element_ty)
        tl.store(ptrs, sums, mask=(cols[:, None] < D) & (c_cols[None, :] < D))
        tl.store(z_ptr + at * D + cols, tl.sum(z, 0) * norm, mask=(cols < D) & (c == 0))


@triton.jit(do_not_specialize=["Lk", "q_first", "q_end", "k_first", "k_end", "num_q_blocks", "num_q_groups", "num_k_blocks", "num_chunks", "blocks_per_chunk", "num_key_programs", "norm"])  # fmt: skip  # noqa: E501
def _prepare_kernel(
    q_ptr, k_ptr, v_ptr, fk_ptr, mask_ptr, q_mean_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_fb, stride_fh, stride_fl,
    H, Hkv, Lk, q_first, q_end, k_first, k_end, num_q_blocks, num_q_groups, num_k_blocks,
    num_chunks, blocks_per_chunk, num_key_programs, norm,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLKQ: tl.constexpr,
    BLKK: tl.constexpr, GROUP: tl.constexpr, PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LINEAR: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first num_key_programs programs take one chunk of key blocks each (the longer work), the others pool q.

    Grid: (num_key_programs + B * H * num_q_groups,); num_key_programs = B * Hkv * num_chunks * NUM_HALVES * cdiv(D, BLOCK_C).
    q_mean: [B, H, num_q_blocks, D], k_mean: [B, Hkv, num_k_blocks, D], k_bias: [B, Hkv, num_k_blocks], all float32;
    k_bias is -inf for a block without a valid key.
    sums: [B, Hkv, num_chunks, NUM_HALVES * D, D] norm * phi(K)^T V; z: its float32 row sums of phi(K).
    """  # noqa: E501
    pid = tl.program_id(0)
    if pid < num_key_programs:
        _sum_keys(
            pid, k_ptr, v_ptr, fk_ptr, mask_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_fb, stride_fh, stride_fl,
            Hkv, Lk, k_first, k_end, num_k_blocks, num_chunks, blocks_per_chunk, norm,
            D, BLOCK_D, BLOCK_C, BLOCK_N, BLKK, PHI, NUM_HALVES, HAS_MASK, HAS_LINEAR, POOL, PRECISION,
        )  # fmt: skip
    else:
        if POOL:
            _pool_queries(
                pid - num_key_programs, q_ptr, q_mean_ptr, stride_qb, stride_qh, stride_ql,
                H, q_first, q_end, num_q_blocks, num_q_groups, D, BLOCK_D, BLKQ, GROUP,
            )  # fmt: skip


@triton.jit
def _select(
    pid, num_pids, q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
    H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys, topk, num_unskipped, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Groups of ROWS query blocks in turn: scores, the topk-th largest by bisection, the list."""
    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, TILE)
    # [ROWS, tiles, W]: so that a warp has whole rows, and counting needs no barrier.
    W: tl.constexpr = BLOCK_N if BLOCK_N < 128 else 128
    n = tl.arange(0, BLOCK_N // W)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    scratch_ptr += pid.to(tl.int64) * (ROWS * num_keys)
    scratch = scratch_ptr + r[:, None, None] * num_keys
    for group in range(pid, num_groups, num_pids):
        bh = (group // groups_per_head).to(tl.int64)
        rows = (group % groups_per_head) * ROWS + r
        row_valid = rows < num_q_blocks
        bh_kv = (bh // H) * Hkv + (bh % H) // (H // Hkv)
        q = tl.load(
            q_mean_ptr + (bh * num_q_blocks + rows)[:, None] * D + d[None, :],
            mask=row_valid[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, num_keys, TILE):
            j = start + t
            k = tl.load(
                k_mean_ptr + (bh_kv * num_k_blocks + j)[:, None] * D + d[None, :],
                mask=(j[:, None] < num_k_blocks) & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if HAS_MASK:
                scores += tl.load(k_bias_ptr + bh_kv * num_k_blocks + j, mask=j < num_k_blocks, other=0.0)[None, :]
            bits = scores.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)
            tl.store(scratch_ptr + r[:, None] * num_keys + j[None, :], tl.where(j[None, :] < num_k_blocks, key, 0))
        tl.debug_barrier()

        keys = tl.load(scratch + n)
        cut = _nth_largest(scratch, keys, n, num_keys, topk, ROWS, BLOCK_N, ONE)
        ties = (topk - _count_above(scratch, keys, n, num_keys, cut, BLOCK_N, ONE))[:, None, None]
        if HAS_SKIP:
            low_cut = _nth_largest(scratch, keys, n, num_keys, num_unskipped, ROWS, BLOCK_N, ONE)
            low_ties = num_unskipped - _count_above(scratch, keys, n, num_keys, low_cut, BLOCK_N, ONE)
        above_seen = tl.zeros([ROWS], tl.int32)
        equal_seen = tl.zeros([ROWS], tl.int32)
        low_equal_seen = tl.zeros([ROWS], tl.int32)
        at = (bh * num_q_blocks + rows)[:, None, None]
        for start in range(0, num_keys, BLOCK_N):
            j = start + n
            inside = j < num_k_blocks
            if not ONE:
                keys = tl.load(scratch + j)
            above = keys > cut[:, None, None]
            equal = (keys == cut[:, None, None]) & inside
            # Both counts in one number: a tile has less than 2^15 keys.
            upto, total = _running_sum(above.to(tl.int32) + (equal.to(tl.int32) << 16))
            rank = equal_seen[:, None, None] + (upto >> 16)
            critical = above | (equal & (rank <= ties))
            position = above_seen[:, None, None] + (upto & 0xFFFF) + tl.minimum(rank, ties) - 1
            above_seen += total & 0xFFFF
            equal_seen += total >> 16
            store = critical & row_valid[:, None, None]
            tl.store(indices_ptr + at * topk + position, tl.broadcast_to(j, [ROWS, BLOCK_N // W, W]), mask=store)
            value = critical.to(tl.int32)
            if HAS_SKIP:
                low_equal = (keys == low_cut[:, None, None]) & inside
                low_upto, low_total = _running_sum(low_equal.to(tl.int32))
                low_rank = low_equal_seen[:, None, None] + low_upto
                low_equal_seen += low_total
                kept = (keys > low_cut[:, None, None]) | (low_equal & (low_rank <= low_ties[:, None, None]))
                value = tl.where(kept, value, -1)
            tl.store(map_ptr + at * num_k_blocks + j, value.to(tl.int8), mask=inside & row_valid[:, None, None])


@triton.jit(do_not_specialize=["num_groups", "groups_per_head", "num_q_blocks", "num_k_blocks", "topk", "num_unskipped", "scale", "num_projecting", "num_chunks"])  # fmt: skip  # noqa: E501
def _select_kernel(
    q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
    sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr,
    H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys, topk, num_unskipped, scale,
    num_projecting, num_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SKIP: tl.constexpr, PROJECT: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The choice; the first num_projecting programs do what else is due between `prepare` and the forward, as
    `_project_sums_kernel` does it.

    Grid: (num_projecting + any,). scratch: [any, ROWS, num_keys] uint32, one program's scores in an order-preserving
    encoding, then zeros; made TILE blocks at a time and read BLOCK_N at a time, once where ONE says that those are
    all. indices: [B, H, num_q_blocks, topk] int32 ascending; map: [B, H, num_q_blocks, num_k_blocks] int8 (eq. 3).
    Ties go to the lower index.
    """
    pid = tl.program_id(0)
    if PROJECT:
        if pid < num_projecting:
            project(
                pid, sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr, num_chunks, 1.0,
                F, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip
    if pid >= num_projecting:
        _select(
            pid - num_projecting, tl.num_programs(0) - num_projecting,
            q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
            H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys, topk, num_unskipped, scale,
            D, BLOCK_D, ROWS, TILE, BLOCK_N, ONE, HAS_MASK, HAS_SKIP, PRECISION,
        )  # fmt: skip


@triton.jit
def _running_sum(x):
    """Sums of x [ROWS, tiles, W] up to and with each place of its row, and whole rows' [ROWS]."""
    totals = tl.sum(x, 2)
    before = tl.cumsum(totals, 1) - totals
    return tl.cumsum(x, 2) + before[:, :, None], tl.sum(totals, 1)


@triton.jit
def _count(scratch, keys, n, num_keys, bound, BLOCK_N: tl.constexpr, ONE: tl.constexpr):
    """Per row the number of keys >= bound > 0. `keys` is the first tile, all there are if ONE."""
    found = tl.sum((keys >= bound[:, None, None]).to(tl.int32), 1)
    if not ONE:
        for start in range(BLOCK_N, num_keys, BLOCK_N):
            found += tl.sum((tl.load(scratch + start + n) >= bound[:, None, None]).to(tl.int32), 1)
    return tl.sum(found, 1)


@triton.jit
def _count_above(scratch, keys, n, num_keys, bound, BLOCK_N: tl.constexpr, ONE: tl.constexpr):
    """Per row the number of keys > bound."""
    above = _count(scratch, keys, n, num_keys, bound + 1, BLOCK_N, ONE)
    return tl.where(bound == 0xFFFFFFFF, 0, above)


@triton.jit
def _nth_largest(scratch, keys, n, num_keys, count, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr):
    """Per row the `count`-th largest key: [ROWS] uint32, found bit by bit from the top."""
    cut = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 1, tl.uint32) << 31
    for _ in range(32):
        candidate = cut | bit
        cut = tl.where(_count(scratch, keys, n, num_keys, candidate, BLOCK_N, ONE) >= count, candidate, cut)
        bit = bit >> 1
    return cut


@triton.jit(do_not_specialize=["num_q_blocks", "num_k_blocks", "total"])
def _invert_kernel(
    map_ptr, starts_ptr, counts_ptr, list_ptr, num_q_blocks, num_k_blocks, total,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COUNT: how many query blocks chose each key block. Otherwise: where its list starts, and the list, ascending.

    Grid: (cdiv(num_k_blocks, COLS), B * H). starts, counts: [B * H, num_k_blocks], list: [B * H, total], int32.
    """
    bh = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, COLS)
    j = tl.program_id(0) * COLS + c
    seen = tl.zeros([COLS], tl.int32)
    base = seen
    if not COUNT:
        before = seen
        for tile in range(0, tl.program_id(0)):
            before += tl.load(counts_ptr + bh * num_k_blocks + tile * COLS + c)
        own = tl.load(counts_ptr + bh * num_k_blocks + j, mask=j < num_k_blocks, other=0)
        base = tl.sum(before, 0) + tl.cumsum(own, 0) - own
        tl.store(starts_ptr + bh * num_k_blocks + j, base, mask=j < num_k_blocks)
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
        tl.store(counts_ptr + bh * num_k_blocks + j, seen, mask=j < num_k_blocks)


def prepare(run, q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, pool, norm):
    """Launch the pass over q, k, v. Returns q_mean, k_mean, k_bias (None: not pooled), sums, z (None: no linear).

    linear: "all" gives sums per chunk of key blocks, "marginal" per key block in q's dtype, "none" nothing.
    """
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    num_q_blocks = cdiv(Lq - sum(keep_q), blkq)
    num_k_blocks = cdiv(Lk - sum(keep_k), blkk)
    halves = HALVES[feature_map] if linear != "none" else 1
    config = prepare_config(q)
    blocks_per_chunk = 1 if linear == "marginal" else chunk_size(num_k_blocks, config.programs, B * Hkv)
    num_chunks = cdiv(num_k_blocks, blocks_per_chunk)
    q_mean = run.empty((B, H, num_q_blocks, D)) if pool else None
    k_mean = run.empty((B, Hkv, num_k_blocks, D)) if pool else None
    k_bias = run.empty((B, Hkv, num_k_blocks)) if pool and key_mask is not None else None
    sums = z = None
    if linear != "none":
        dtype = torch.float32 if linear == "all" else q.dtype
        sums = run.empty((B, Hkv, num_chunks, halves * D, D), dtype)
        z = run.empty((B, Hkv, num_chunks, halves * D))
    elif not pool:
        return None, None, None, None, None
    BLOCK_C = min(config.block_c, block_d(D)) if linear != "none" else block_d(D)
    num_key_programs = B * Hkv * num_chunks * halves * cdiv(D, BLOCK_C)
    group = max(1, config.rows // blkq)
    num_q_groups = cdiv(num_q_blocks, group)
    fk = k if fk is None else fk
    run.launch(
        _prepare_kernel, (num_key_programs + (B * H * num_q_groups if pool else 0),),
        q, k, v, fk, key_mask, q_mean, k_mean, k_bias, sums, z,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *fk.stride()[:3],
        H, Hkv, Lk, keep_q[0], Lq - keep_q[1], keep_k[0], Lk - keep_k[1], num_q_blocks, num_q_groups, num_k_blocks,
        num_chunks, blocks_per_chunk, num_key_programs, norm,
        D=D, BLOCK_D=block_d(D), BLOCK_C=BLOCK_C, BLOCK_N=min(blkk, config.block_n), BLKQ=blkq, BLKK=blkk, GROUP=group,
        PHI=feature_map, NUM_HALVES=halves, HAS_MASK=key_mask is not None, HAS_LINEAR=linear != "none", POOL=pool,
        PRECISION=PRECISION, **config.options,
    )  # fmt: skip
    return q_mean, k_mean, k_bias, sums, z


def select(run, q_mean, k_mean, k_bias, skip, scale, dtype, indices, block_map, sums=None):
    """Launch the choice: fills indices [B, H, num_q_blocks, n] int32 and the int8 block map.

    dtype: of the tensors that the means were taken of. sums: tensors of `project_sums`, to do its work besides.
    """
    B, H, num_q_blocks, D = q_mean.shape
    Hkv, num_k_blocks = k_mean.shape[1:3]
    num_skipped = int(skip * num_k_blocks)
    config = select_config(q_mean)
    groups_per_head = cdiv(num_q_blocks, config.rows)
    num_groups = B * H * groups_per_head
    programs = min(num_groups, config.programs)
    # A power of two, so that few lengths need a kernel of their own.
    BLOCK_N = max(16, min(config.block_n, 1 << (num_k_blocks - 1).bit_length()))
    num_keys = cdiv(num_k_blocks, BLOCK_N) * BLOCK_N
    F, num_chunks, projecting = (D, 0, 0) if sums is None else projection(sums[0], Hkv)
    run.launch(
        _select_kernel, (projecting + programs,),
        q_mean, k_mean, k_bias, run.empty((programs, config.rows, num_keys), torch.uint32), indices, block_map,
        *(sums or [None] * 6), H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys,
        indices.shape[3], num_k_blocks - num_skipped, scale, projecting, num_chunks,
        D=D, BLOCK_D=block_d(D), ROWS=config.rows, TILE=min(config.block_c, BLOCK_N), BLOCK_N=BLOCK_N,
        ONE=num_keys == BLOCK_N, HAS_MASK=k_bias is not None, HAS_SKIP=num_skipped > 0,
        PROJECT=sums is not None, F=F, PRECISION=rounded_precision(dtype), **config.options,
    )  # fmt: skip


def indices_of(block_map, topk):
    """Ascending indices [B, H, num_q_blocks, n] int32 of the critical blocks of a given map."""
    n = max(1, int(topk * block_map.shape[-1]))
    order = (block_map != 1).to(torch.int8).argsort(dim=-1, stable=True)
    return order[..., :n].to(torch.int32).contiguous()


def invert(run, block_map, topk):
    """Per key block who chose it, int32: starts, counts [B * H, num_k_blocks], list [B * H, total] of query blocks."""
    B, H, num_q_blocks, num_k_blocks = block_map.shape
    total = num_q_blocks * max(1, int(topk * num_k_blocks))
    starts, counts = (run.empty((B * H, num_k_blocks), torch.int32) for _ in range(2))
    listed = run.empty((B * H, total), torch.int32)
    grid = (cdiv(num_k_blocks, 32), B * H)
    sizes = (num_q_blocks, num_k_blocks, total)
    for count in (True, False):
        run.launch(_invert_kernel, grid, block_map, starts, counts, listed, *sizes, COUNT=count, ROWS=64, COLS=32)
    return starts, counts, listed
