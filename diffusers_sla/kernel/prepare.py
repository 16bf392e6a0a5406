"""The one read of q, k and v before the choice: block means of q and k and, in the same pass, the linear
branch's sums of phi(K)^T V."""

import torch
import triton
import triton.language as tl

from .features import HALVES, phi_stats, phi_tile
from .forward import add_dot
from .launch import PRECISION, block_d, cdiv, chunk_size, prepare_config, takes_gluon
from .plan import aligned


@triton.jit
def _sum_of_rows(x, HALF: tl.constexpr):
    """Sum of the rows of x [N, BLOCK_D] in float32: [1, BLOCK_D], or HALF 16 times over, as a product, because a sum
    across warps goes through shared memory number by number, eight threads at one bank."""
    if HALF:
        return tl.dot(tl.full([16, x.shape[0]], 1.0, x.dtype), x)
    else:
        return tl.sum(x, 0)[None, :]


@triton.jit
def _pool_queries(
    pid, q_ptr, q_mean_ptr, stride_qb, stride_qh, stride_ql, H, q_first, q_end, num_q_blocks, num_q_groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLKQ: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Means of GROUP query blocks."""
    HALF: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    cols = tl.arange(0, BLOCK_D)
    SAME: tl.constexpr = 16 if HALF else 1
    same = tl.arange(0, SAME)
    bh = pid // num_q_groups
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)  # divided in 32 bits: 64 take hundreds of instructions
    base = q_ptr + b * stride_qb + h * stride_qh
    first_block = pid % num_q_groups * GROUP
    for block in range(first_block, tl.minimum(first_block + GROUP, num_q_blocks)):
        rows = q_first + block * BLKQ + tl.arange(0, BLKQ)
        inside = (rows[:, None] < q_end) & (cols[None, :] < D)
        x = tl.load(base + rows.to(tl.int64)[:, None] * stride_ql + cols[None, :], mask=inside, other=0.0)
        mean = _sum_of_rows(x, HALF) / tl.minimum(q_end - (q_first + block * BLKQ), BLKQ)
        at = (bh.to(tl.int64) * num_q_blocks + block) * D
        tl.store(
            q_mean_ptr + at + cols[None, :] + 0 * same[:, None], mean, mask=(same[:, None] == 0) & (cols[None, :] < D)
        )


@triton.jit
def _sum_keys(
    pid, k_ptr, v_ptr, fk_ptr, mask_ptr, k_mean_ptr, k_bias_ptr, sums_ptr, z_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_fb, stride_fh, stride_fl,
    Hkv, Lk, k_first, k_end, num_k_blocks, num_chunks, blocks_per_chunk, norm,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLKK: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LINEAR: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = k_ptr.dtype.element_ty != tl.float32
    cols = tl.arange(0, BLOCK_D)
    SAME: tl.constexpr = 16 if HALF else 1
    same = tl.arange(0, SAME)
    NUM_C: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    c = pid % NUM_C
    half = (pid // NUM_C) % NUM_HALVES
    chunk = (pid // (NUM_C * NUM_HALVES)) % num_chunks
    bh = pid // (NUM_C * NUM_HALVES * num_chunks)
    b, h = (bh // Hkv).to(tl.int64), (bh % Hkv).to(tl.int64)
    bh = bh.to(tl.int64)
    c_cols = c * BLOCK_C + tl.arange(0, BLOCK_C)
    pools = (c == 0) & (half == 0)  # one of the programs that share a chunk
    # Transposed: so the tile that comes from memory is the one that is read across.
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    z = tl.zeros([16, BLOCK_D], tl.float32)  # rows 16 apart are one thread's
    first_block = chunk * blocks_per_chunk
    for j in range(first_block, tl.minimum(first_block + blocks_per_chunk, num_k_blocks)):
        total = tl.zeros([SAME, BLOCK_D], tl.float32)
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
            total += _sum_of_rows(x, HALF)
            if HAS_LINEAR:
                v = tl.load(
                    v_ptr + b * stride_vb + h * stride_vh + offsets * stride_vl + c_cols[None, :],
                    mask=valid[:, None] & (c_cols[None, :] < D), other=0.0,
                )  # fmt: skip
                if PHI == "hedgehog":
                    y = tl.load(fk_ptr + b * stride_fb + h * stride_fh + offsets * stride_fl + cols[None, :], mask=inside, other=0.0).to(tl.float32)  # fmt: skip  # noqa: E501
                top, row_total = phi_stats(y, cols[None, :] < D, PHI)
                f = phi_tile(y, top, inside, PHI, 0)
                if NUM_HALVES == 2:
                    f = tl.where(half == 0, f, phi_tile(y, top, inside, PHI, 1))
                f *= (1.0 / row_total)[:, None]
                acc = add_dot(tl.trans(v), f.to(v.dtype), acc, v.dtype == tl.float32, PRECISION)
                z += tl.sum(tl.reshape(f, [BLOCK_N // 16, 16, BLOCK_D]), 0)
        if POOL:
            at = bh * num_k_blocks + j
            once = (same[:, None] == 0) & (cols[None, :] < D) & pools
            k_mean_ptrs = k_mean_ptr + at * D + cols[None, :] + 0 * same[:, None]
            tl.store(k_mean_ptrs, total / tl.maximum(count, 1), mask=once)
            if HAS_MASK:
                tl.store(k_bias_ptr + at, tl.where(count == 0, float("-inf"), 0.0), mask=pools)
    if HAS_LINEAR:
        chunk_at = bh * num_chunks + chunk
        ptrs = sums_ptr + ((chunk_at * D + c_cols[:, None]) * NUM_HALVES + half) * D + cols[None, :]
        sums = (acc * norm).to(sums_ptr.dtype.element_ty)
        tl.store(ptrs, sums, mask=(c_cols[:, None] < D) & (cols[None, :] < D))
        tl.store(z_ptr + (chunk_at * NUM_HALVES + half) * D + cols, tl.sum(z, 0) * norm, mask=(cols < D) & (c == 0))


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
    sums: [B, Hkv, num_chunks, D, NUM_HALVES * D] norm * V^T phi(K); z: [B, Hkv, num_chunks, NUM_HALVES * D] float32.
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


def prepare(run, q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, pool, norm):
    """Launch the pass over q, k, v. Returns q_mean, k_mean, k_bias (None: not pooled), sums, z (None: no linear).

    linear: "all" gives sums per chunk of key blocks, "marginal" per key block in q's dtype, "none" nothing.
    """
    usual = pool and linear != "marginal" and key_mask is None and HALVES[feature_map] == 1 and blkk == 64 <= blkq
    # Each of its programs takes a share of the queries beside its keys: not many more of those than of these.
    even = 2 * q.shape[1] * q.shape[2] <= 3 * k.shape[1] * k.shape[2]
    if usual and even and all(map(aligned, (q, k, v))) and takes_gluon(q):
        from .hopper_prepare import hopper_prepare

        return hopper_prepare(run, q, k, v, blkq, keep_q, keep_k, feature_map, linear == "all", norm)
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    num_q_blocks = cdiv(Lq - sum(keep_q), blkq)
    num_k_blocks = cdiv(Lk - sum(keep_k), blkk)
    halves = HALVES[feature_map] if linear != "none" else 1
    config = prepare_config(q, blkk, halves)
    blocks_per_chunk = 1 if linear == "marginal" else chunk_size(num_k_blocks, config.programs, B * Hkv)
    num_chunks = cdiv(num_k_blocks, blocks_per_chunk)
    q_mean = run.empty((B, H, num_q_blocks, D)) if pool else None
    k_mean = run.empty((B, Hkv, num_k_blocks, D)) if pool else None
    k_bias = run.empty((B, Hkv, num_k_blocks)) if pool and key_mask is not None else None
    sums = z = None
    if linear != "none":
        dtype = torch.float32 if linear == "all" else q.dtype
        sums = run.empty((B, Hkv, num_chunks, D, halves * D), dtype)
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
        D=D, BLOCK_D=block_d(D), BLOCK_C=BLOCK_C, BLOCK_N=config.block_n, BLKQ=blkq, BLKK=blkk, GROUP=group,
        PHI=feature_map, NUM_HALVES=halves, HAS_MASK=key_mask is not None, HAS_LINEAR=linear != "none", POOL=pool,
        PRECISION=PRECISION, **config.options,
    )  # fmt: skip
    return q_mean, k_mean, k_bias, sums, z
