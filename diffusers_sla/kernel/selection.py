"""Which key blocks each query block keeps: scores of the pooled means, top-k; and the inverse list the backward walks.

`select` never holds more than a few rows of scores.
"""

import torch
import triton
import triton.language as tl

from .launch import block_d, cdiv, projected_columns, rounded_precision, select_config, summed_stages
from .projection import project, projection


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
    # A tile of [ROWS, W] numbers gives a warp whole rows, so that counting needs no barrier.
    W: tl.constexpr = BLOCK_N if BLOCK_N < 128 else 128
    w = tl.arange(0, W)[None, :]
    scratch_ptr += pid.to(tl.int64) * (ROWS * num_keys)
    scratch = scratch_ptr + r[:, None] * num_keys + w
    for group in range(pid, num_groups, num_pids):
        bh = group // groups_per_head
        rows = (group % groups_per_head) * ROWS + r
        row_valid = rows < num_q_blocks
        bh_kv = (bh // H * Hkv + bh % H // (H // Hkv)).to(tl.int64)
        bh = bh.to(tl.int64)
        # Rows past the end repeat the last: equal scores would keep the search going.
        q_rows = bh * num_q_blocks + tl.minimum(rows, num_q_blocks - 1)
        q = tl.load(q_mean_ptr + q_rows[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        tl.debug_barrier()
        for start in range(0, num_keys, TILE):
            j = start + t
            k = tl.load(
                k_mean_ptr + (bh_kv * num_k_blocks + j)[:, None] * D + d[None, :],
                mask=(j[:, None] < num_k_blocks) & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + 0.0  # -0.0 would order below 0.0
            if HAS_MASK:
                bias = tl.load(k_bias_ptr + bh_kv * num_k_blocks + j, mask=j < num_k_blocks, other=0.0)
                scores = tl.where(bias[None, :] < 0, float("-inf"), scores)  # NaN, too
            bits = scores.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)
            tl.store(scratch_ptr + r[:, None] * num_keys + j[None, :], tl.where(j[None, :] < num_k_blocks, key, 0))
        tl.debug_barrier()

        cut, ties = _threshold(scratch, num_keys, topk, ROWS, W, BLOCK_N, ONE)
        if HAS_SKIP:
            low_cut, low_ties = _threshold(scratch, num_keys, num_unskipped, ROWS, W, BLOCK_N, ONE)
        above_seen = tl.zeros([ROWS, 1], tl.int32)
        equal_seen = above_seen
        low_equal_seen = above_seen
        at = (bh * num_q_blocks + rows)[:, None]
        for start in range(0, num_keys, W):
            j = start + w
            inside = j < num_k_blocks
            key = tl.load(scratch + start)
            above = key > cut[:, None]
            equal = (key == cut[:, None]) & inside
            # Both counts in one number: a tile has less than 2^15 keys.
            both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
            upto = tl.cumsum(both, 1)
            total = tl.sum(both, 1)[:, None]
            rank = equal_seen + (upto >> 16)
            critical = above | (equal & (rank <= ties[:, None]))
            position = above_seen + (upto & 0xFFFF) + tl.minimum(rank, ties[:, None]) - 1
            above_seen += total & 0xFFFF
            equal_seen += total >> 16
            store = critical & row_valid[:, None]
            tl.store(indices_ptr + at * topk + position, tl.broadcast_to(j, [ROWS, W]), mask=store)
            value = critical.to(tl.int32)
            if HAS_SKIP:
                low_equal = (key == low_cut[:, None]) & inside
                low_rank = low_equal_seen + tl.cumsum(low_equal.to(tl.int32), 1)
                low_equal_seen += tl.sum(low_equal.to(tl.int32), 1)[:, None]
                kept = (key > low_cut[:, None]) | (low_equal & (low_rank <= low_ties[:, None]))
                value = tl.where(kept, value, -1)
            tl.store(map_ptr + at * num_k_blocks + j, value.to(tl.int8), mask=inside & row_valid[:, None])


@triton.jit(do_not_specialize=["num_groups", "groups_per_head", "num_q_blocks", "num_k_blocks", "topk", "num_unskipped", "scale", "num_selecting", "num_chunks"])  # fmt: skip  # noqa: E501
def _select_kernel(
    q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
    sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr,
    H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys, topk, num_unskipped, scale,
    num_selecting, num_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SKIP: tl.constexpr, PROJECT: tl.constexpr, F: tl.constexpr,
    BLOCK_E: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The choice; programs after the first num_selecting do what else is due between `prepare` and the forward, as
    `_project_sums_kernel` does it: they are the shorter ones.

    Grid: (num_selecting, which may be any, + those of `projection`,). scratch: [num_selecting, ROWS, num_keys]
    uint32, one program's scores in an order-preserving encoding, then zeros; made TILE blocks at a time. The search
    for the topk-th keeps the first BLOCK_N, all of them where ONE says so, and reads the others again. indices: [B,
    H, num_q_blocks, topk] int32 ascending; map: [B, H, num_q_blocks, num_k_blocks] int8 (eq. 3). Ties go to the
    lower index.
    """
    pid = tl.program_id(0)
    if pid < num_selecting:
        _select(
            pid, num_selecting, q_mean_ptr, k_mean_ptr, k_bias_ptr, scratch_ptr, indices_ptr, map_ptr,
            H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys, topk, num_unskipped, scale,
            D, BLOCK_D, ROWS, TILE, BLOCK_N, ONE, HAS_MASK, HAS_SKIP, PRECISION,
        )  # fmt: skip
    else:
        if PROJECT:
            project(
                pid - num_selecting, sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr, num_chunks, 1.0,
                F, D, BLOCK_D, BLOCK_E, STAGES, True, PRECISION,
            )  # fmt: skip


@triton.jit
def _count(a, b, c, d, scratch, num_keys, bound, W: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr):
    """Per row the number of keys >= bound > 0. a to d: the first tiles, as far as BLOCK_N goes; all if ONE."""
    found = (a >= bound[:, None]).to(tl.int32)
    if BLOCK_N > W:
        found += (b >= bound[:, None]).to(tl.int32)
    if BLOCK_N > 2 * W:
        found += (c >= bound[:, None]).to(tl.int32) + (d >= bound[:, None]).to(tl.int32)
    if not ONE:
        for start in range(BLOCK_N, num_keys, W):
            found += (tl.load(scratch + start) >= bound[:, None]).to(tl.int32)
    return tl.sum(found, 1)


@triton.jit
def _threshold(
    scratch, num_keys, count, ROWS: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr
):
    """Per row a number [ROWS] uint32 that `count` keys reach, and more only if they are equal; and how many [ROWS] of
    those that equal it are among the `count` largest. Found bit by bit from the top, until it tells them apart."""
    tl.static_assert(BLOCK_N <= 4 * W)
    a = tl.load(scratch)
    b = a
    c = a
    d = a
    if BLOCK_N > W:
        b = tl.load(scratch + W)
    if BLOCK_N > 2 * W:
        c = tl.load(scratch + 2 * W)
        d = tl.load(scratch + 3 * W)
    cut = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 1, tl.uint32) << 31
    left = 1
    while left > 0:
        for _ in tl.static_range(4):
            found = _count(a, b, c, d, scratch, num_keys, cut | bit, W, BLOCK_N, ONE)
            cut = tl.where(found >= count, cut | bit, cut)
            bit = tl.where(found == count, 0, bit >> 1)
        left = tl.sum((bit > 0).to(tl.int32), 0)
    above = _count(a, b, c, d, scratch, num_keys, cut + 1, W, BLOCK_N, ONE)
    return cut, count - tl.where(cut == 0xFFFFFFFF, 0, above)


@triton.jit
def invert(
    pid, bh, map_ptr, indices_ptr, starts_ptr, counts_ptr, list_ptr, num_q_blocks, num_k_blocks, topk,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of COLS key blocks of a head: where the list of the query blocks that chose each starts, its length, and the
    list, ascending. starts, counts: [B * H, num_k_blocks], list: [B * H, num_q_blocks * topk], int32."""
    j = pid * COLS + tl.arange(0, COLS)
    total = num_q_blocks * topk
    # The lists of the key blocks before these have as many entries as name one of them.
    n = tl.arange(0, 32 * ROWS)
    before = tl.zeros([32 * ROWS], tl.int32)
    for start in range(0, total, 32 * ROWS):
        named = tl.load(indices_ptr + bh * total + start + n, mask=start + n < total, other=num_k_blocks)
        before += (named < pid * COLS).to(tl.int32)
    i = tl.arange(0, ROWS)[:, None]
    map_ptr += bh * num_q_blocks * num_k_blocks + j[None, :]
    chosen = tl.zeros([ROWS, COLS], tl.int32)
    for start in range(0, num_q_blocks, ROWS):
        inside = (start + i < num_q_blocks) & (j[None, :] < num_k_blocks)
        chosen += (tl.load(map_ptr + (start + i).to(tl.int64) * num_k_blocks, mask=inside, other=0) == 1).to(tl.int32)
    counts = tl.sum(chosen, 0)
    first = tl.sum(before, 0) + tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + bh * num_k_blocks + j, first, mask=j < num_k_blocks)
    tl.store(counts_ptr + bh * num_k_blocks + j, counts, mask=j < num_k_blocks)
    for start in range(0, num_q_blocks, ROWS):
        inside = (start + i < num_q_blocks) & (j[None, :] < num_k_blocks)
        chosen = (tl.load(map_ptr + (start + i).to(tl.int64) * num_k_blocks, mask=inside, other=0) == 1).to(tl.int32)
        position = first[None, :] + tl.cumsum(chosen, 0) - 1
        tl.store(list_ptr + bh * total + position, tl.broadcast_to(start + i, [ROWS, COLS]), mask=chosen != 0)
        first += tl.sum(chosen, 0)


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
        _select_kernel, (programs + projecting,),
        q_mean, k_mean, k_bias, run.empty((programs, config.rows, num_keys), torch.uint32), indices, block_map,
        *(sums or [None] * 6), H, Hkv, num_groups, groups_per_head, num_q_blocks, num_k_blocks, num_keys,
        indices.shape[3], num_k_blocks - num_skipped, scale, programs, num_chunks,
        D=D, BLOCK_D=block_d(D), ROWS=config.rows, TILE=min(config.block_c, BLOCK_N), BLOCK_N=BLOCK_N,
        ONE=num_keys == BLOCK_N, HAS_MASK=k_bias is not None, HAS_SKIP=num_skipped > 0,
        PROJECT=sums is not None, F=F, BLOCK_E=32 if sums is None else projected_columns(sums[4]),
        STAGES=summed_stages(q_mean), PRECISION=rounded_precision(dtype), **config.options,
    )  # fmt: skip


def indices_of(block_map, topk):
    """Ascending indices [B, H, num_q_blocks, n] int32 of the critical blocks of a given map."""
    n = max(1, int(topk * block_map.shape[-1]))
    order = (block_map != 1).to(torch.int8).argsort(dim=-1, stable=True)
    return order[..., :n].to(torch.int32).contiguous()
