"""The linear branch around the kernels: its sums, and its backward.

With norm, which keeps sums over any length inside float16, D / Lk or, where a row of phi does not sum to 1, 1 / Lk:
H = norm sum phi(k)^T v,  z = norm sum phi(k),  M = H W^T,  O_l W^T = phi(q) M / (phi(q) z + norm 1e-5)   (eq. 5, 6).
So W only ever multiplies [D, D] matrices, and the kernels know nothing of it. H and M are per key head when every
block is summed ("all"), per query block when only the marginal ones are.
"""

import math

import torch
import triton
import triton.language as tl

from .eager import SOFTMAX_MAPS
from .features import HALVES, operand, phi_stats, phi_tile, phi_tile_backward
from .forward import add_dot, dot_over_d
from .launch import (
    PRECISION,
    block_d,
    cdiv,
    chunk_size,
    linear_k_config,
    linear_k_float16_config,
    linear_q_config,
    rounded_precision,
    takes_gluon,
)
from .plan import aligned

EPS = 1e-5


@triton.jit(do_not_specialize=["M_BLOCKS", "q_first", "q_end", "num_tiles", "tiles_per_chunk", "eps"])
def _linear_bwd_q_kernel(
    x_ptr, do_ptr, m_ptr, z_ptr, dx_ptr, dm_ptr, dz_ptr, dbias_ptr,
    stride_xb, stride_xh, stride_xl, stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
    H, M_HEADS, M_BLOCKS, q_first, q_end, num_tiles, tiles_per_chunk, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk of tiles of queries: the gradient of phi's input x, and the chunk's share of dM, dz and the bias's.

    Grid: (num_chunks, B * H, cdiv(D, BLOCK_R)); the last axis takes BLOCK_R features each.
    m: [B, M_HEADS, M_BLOCKS, NUM_HALVES * D, D], z: [.., NUM_HALVES * D] float32; M_BLOCKS is 1 or num_chunks.
    dx: strides g. dm: [B, H, num_chunks, D, NUM_HALVES * D]; dz, dbias: [B, H, num_chunks, NUM_HALVES * D or D]
    float32.
    """
    chunk = tl.program_id(0)
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    m_head = b * M_HEADS + bh % H // (H // M_HEADS)
    bh = bh.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    own = tl.program_id(2) * BLOCK_R + r
    own_valid = own < D
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    OPERAND: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty == tl.float16 else x_ptr.dtype.element_ty
    WHOLE: tl.constexpr = BLOCK_R == BLOCK_D
    ONE: tl.constexpr = WHOLE and NUM_HALVES == 1  # then M is one tile, loaded once
    m_at = (m_head * M_BLOCKS + tl.where(M_BLOCKS == 1, 0, chunk)) * NUM_HALVES
    square = own_valid[:, None] & (cols[None, :] < D)
    m = tl.load(m_ptr + (m_at * D + own)[:, None] * D + cols[None, :], mask=square, other=0.0)
    z = tl.load(z_ptr + m_at * D + own, mask=own_valid, other=0.0)
    # dM is transposed, as all sums are: so the tile that comes from memory is the one that is read across.
    dm_0 = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    # Sums over rows stay in their threads until the end: the rows of a warp of a product, or of a warp of a load.
    dz_0 = tl.zeros([BLOCK_M // 16, 8, BLOCK_R], tl.float32)
    if NUM_HALVES == 2:
        dm_1 = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        dz_1 = tl.zeros([BLOCK_M // 16, 8, BLOCK_R], tl.float32)
    dbias = tl.zeros([16, BLOCK_D], tl.float32)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, num_tiles)):
        rows = q_first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = rows < q_end
        inside = row_valid[:, None] & (cols[None, :] < D)
        at = rows.to(tl.int64)[:, None]
        x_base = x_ptr + b * stride_xb + h * stride_xh + at * stride_xl
        x = tl.load(x_base + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        do = tl.load(do_ptr + b * stride_db + h * stride_dh + at * stride_dl + cols[None, :], mask=inside, other=0.0)
        top, total = phi_stats(x, cols[None, :] < D, PHI)
        inv_total = (1.0 / total)[:, None]
        # phi . M dO^T is O_l . dO times the denominator: no need of O_l itself.
        g = tl.zeros([BLOCK_M], tl.float32)
        den = tl.zeros([BLOCK_M], tl.float32)
        for half in tl.static_range(NUM_HALVES):
            for first in tl.static_range(0, D, BLOCK_R):
                part = first + r
                x_part = x
                if not WHOLE:
                    x_part = tl.load(x_base + part[None, :], mask=row_valid[:, None] & (part[None, :] < D), other=0.0).to(tl.float32)  # fmt: skip  # noqa: E501
                f = phi_tile(x_part, top, part[None, :] < D, PHI, half) * inv_total
                if not ONE:
                    feature = (m_at + half) * D + part
                    z = tl.load(z_ptr + feature, mask=part < D, other=0.0)
                    m = tl.load(m_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
                mdo = dot_over_d(do, tl.trans(m), EXACT, PRECISION)
                g += tl.sum(f * mdo, 1)
                den += tl.sum(f * z[None, :], 1)
        # 0 where a row has no marginal block: nothing but eps to divide by.
        inv = tl.where(den == 0.0, 0.0, 1.0 / (den + eps))
        g *= inv
        dden = tl.where(row_valid, -g * inv, 0.0)
        t = g * (1.0 - den * inv)  # sum of phi * dphi over the row

        x_own = x
        if not WHOLE:
            x_own = tl.load(x_base + own[None, :], mask=row_valid[:, None] & own_valid[None, :], other=0.0).to(tl.float32)  # fmt: skip  # noqa: E501
        dx = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for half in tl.static_range(NUM_HALVES):
            if not ONE:
                f = phi_tile(x_own, top, own_valid[None, :], PHI, half) * inv_total
                feature = (m_at + half) * D + own
                z = tl.load(z_ptr + feature, mask=own_valid, other=0.0)
                m = tl.load(m_ptr + feature[:, None] * D + cols[None, :], mask=square, other=0.0)
                mdo = dot_over_d(do, tl.trans(m), EXACT, PRECISION)
            df = mdo * inv[:, None] + dden[:, None] * z[None, :]
            dx += phi_tile_backward(x_own, f, df, t, PHI, half)
            dz = tl.sum(tl.reshape(f * dden[:, None], [BLOCK_M // 16, 2, 8, BLOCK_R]), 1)
            f = operand(f * inv[:, None], OPERAND, EXACT)
            if half == 0:
                dm_0 = add_dot(tl.trans(do).to(OPERAND), f, dm_0, EXACT, PRECISION)
                dz_0 += dz
            else:
                dm_1 = add_dot(tl.trans(do).to(OPERAND), f, dm_1, EXACT, PRECISION)
                dz_1 += dz
        dbias += tl.sum(tl.reshape(do.to(tl.float32), [BLOCK_M // 16, 16, BLOCK_D]), 0)
        dx_ptrs = dx_ptr + b * stride_gb + h * stride_gh + at * stride_gl + own[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=row_valid[:, None] & own_valid[None, :])
    out = bh * tl.num_programs(0) + chunk
    tl.store(dbias_ptr + out * D + cols, tl.sum(dbias, 0), mask=(cols < D) & (tl.program_id(2) == 0))
    dm_ptrs = dm_ptr + (out * D + cols[:, None]) * (NUM_HALVES * D) + own[None, :]
    square = (cols[:, None] < D) & own_valid[None, :]
    tl.store(dm_ptrs, dm_0.to(dm_ptr.dtype.element_ty), mask=square)
    feature = out * NUM_HALVES * D + own
    tl.store(dz_ptr + feature, tl.sum(tl.sum(dz_0, 0), 0), mask=own_valid)
    if NUM_HALVES == 2:
        tl.store(dm_ptrs + D, dm_1.to(dm_ptr.dtype.element_ty), mask=square)
        feature += D
        tl.store(dz_ptr + feature, tl.sum(tl.sum(dz_1, 0), 0), mask=own_valid)


@triton.jit
def _weight_gradients(
    pid, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr, num_rows, num_shares,
    D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dW = dM^T H over all features of all heads; the last programs sum the shares of db."""
    NUM: tl.constexpr = (D + TILE - 1) // TILE
    e = pid % NUM * TILE + tl.arange(0, TILE)
    d = pid // NUM * TILE + tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    if pid < NUM * NUM:
        dw = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, num_rows, ROWS):
            at = (start + r)[:, None]
            there = at < num_rows
            dm = tl.load(dm_ptr + at * D + e[None, :], mask=there & (e[None, :] < D), other=0.0)
            h = tl.load(h_ptr + at * D + d[None, :], mask=there & (d[None, :] < D), other=0.0)
            dw = add_dot(tl.trans(dm), h, dw, True, PRECISION)
        ptrs = dw_ptr + e[:, None] * D + d[None, :]
        tl.store(ptrs, dw.to(dw_ptr.dtype.element_ty), mask=(e[:, None] < D) & (d[None, :] < D))
    elif dbias_ptr is not None:
        total = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, num_shares, ROWS):
            there = (start + r[:, None] < num_shares) & (e[None, :] < D)
            total += tl.load(shares_ptr + (start + r)[:, None] * D + e[None, :], mask=there, other=0.0)
        tl.store(dbias_ptr + e, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty), mask=e < D)


@triton.jit
def _key_gradients(
    pid, x_ptr, v_ptr, mask_ptr, dh_ptr, dz_ptr, dx_ptr, dv_ptr,
    stride_xb, stride_xh, stride_xl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_wb, stride_wh, stride_wl,
    Hkv, H_BLOCKS, Lk, k_first, k_end, num_tiles, num_chunks, tiles_per_chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk of tiles of keys."""
    chunk = pid % num_chunks
    bh = pid // num_chunks
    b, h = (bh // Hkv).to(tl.int64), (bh % Hkv).to(tl.int64)
    bh = bh.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    WHOLE: tl.constexpr = BLOCK_R == BLOCK_D
    ONE: tl.constexpr = WHOLE and NUM_HALVES == 1  # then dH is one tile, loaded once
    h_at = (bh * H_BLOCKS + tl.where(H_BLOCKS == 1, 0, chunk)) * NUM_HALVES
    dh = tl.load(dh_ptr + (h_at * D + r)[:, None] * D + cols[None, :], mask=(r[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
    dh = operand(dh, dh.dtype, EXACT)
    dz = tl.load(dz_ptr + h_at * D + r, mask=r < D, other=0.0)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, num_tiles)):
        rows = k_first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_valid = rows < k_end
        visible = row_valid
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + b * Lk + rows, mask=visible, other=0) != 0)
        inside = visible[:, None] & (cols[None, :] < D)
        at = rows.to(tl.int64)[:, None]
        x_base = x_ptr + b * stride_xb + h * stride_xh + at * stride_xl
        x = tl.load(x_base + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + b * stride_vb + h * stride_vh + at * stride_vl + cols[None, :], mask=inside, other=0.0)
        top, total = phi_stats(x, cols[None, :] < D, PHI)
        inv_total = (1.0 / total)[:, None]

        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        t = tl.zeros([BLOCK_N], tl.float32)  # sum of phi * dphi over the row
        for half in tl.static_range(NUM_HALVES):
            for first in tl.static_range(0, D, BLOCK_R):
                part = first + r
                part_valid = visible[:, None] & (part[None, :] < D)
                x_part = x
                if not WHOLE:
                    x_part = tl.load(x_base + part[None, :], mask=part_valid, other=0.0).to(tl.float32)
                f = phi_tile(x_part, top, part_valid, PHI, half) * inv_total
                if not ONE:
                    feature = (h_at + half) * D + part
                    dz = tl.load(dz_ptr + feature, mask=part < D, other=0.0)
                    dh = tl.load(dh_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
                    dh = operand(dh, dh.dtype, EXACT)
                df = dot_over_d(v.to(dh.dtype), tl.trans(dh), EXACT, PRECISION) + dz[None, :]
                t += tl.sum(f * df, 1)
                dv = add_dot(operand(f, dh.dtype, EXACT), dh, dv, EXACT, PRECISION)
        stored = row_valid[:, None] & (cols[None, :] < D)
        dv_ptrs = dv_ptr + b * stride_wb + h * stride_wh + at * stride_wl + cols[None, :]
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=stored)

        for first in tl.static_range(0, D, BLOCK_R):
            part = first + r
            part_valid = visible[:, None] & (part[None, :] < D)
            x_part = x
            if not WHOLE:
                x_part = tl.load(x_base + part[None, :], mask=part_valid, other=0.0).to(tl.float32)
            dx = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            for half in tl.static_range(NUM_HALVES):
                if not ONE:
                    f = phi_tile(x_part, top, part_valid, PHI, half) * inv_total
                    feature = (h_at + half) * D + part
                    dz = tl.load(dz_ptr + feature, mask=part < D, other=0.0)
                    dh = tl.load(dh_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
                    dh = operand(dh, dh.dtype, EXACT)
                    df = dot_over_d(v.to(dh.dtype), tl.trans(dh), EXACT, PRECISION) + dz[None, :]
                dx += phi_tile_backward(x_part, f, df, t, PHI, half)
            dx = tl.where(visible[:, None], dx, 0.0)
            dx_ptrs = dx_ptr + b * stride_gb + h * stride_gh + at * stride_gl + part[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=row_valid[:, None] & (part[None, :] < D))


@triton.jit(do_not_specialize=["H_BLOCKS", "Lk", "k_first", "k_end", "num_tiles", "num_chunks", "tiles_per_chunk", "num_rows", "num_shares"])  # fmt: skip  # noqa: E501
def _linear_bwd_k_kernel(
    x_ptr, v_ptr, mask_ptr, dh_ptr, dz_ptr, dx_ptr, dv_ptr, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr,
    stride_xb, stride_xh, stride_xl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_wb, stride_wh, stride_wl,
    Hkv, H_BLOCKS, Lk, k_first, k_end, num_tiles, num_chunks, tiles_per_chunk, num_rows, num_shares,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_PROGRAMS: tl.constexpr, WEIGHT_PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first WEIGHT_PROGRAMS programs compute the gradients of W and its bias (few, but long), the others those of
    phi's input x and of v, from dh = norm dH and dz = norm dz.

    Grid: (WEIGHT_PROGRAMS + num_chunks * B * Hkv,). dh: [B, Hkv, H_BLOCKS, NUM_HALVES * D, D], dz: [.., NUM_HALVES *
    D] float32; H_BLOCKS is 1 or num_chunks. dx: strides g, dv: strides w. dm, h: [num_rows, D], of all features of all
    heads, shares: [num_shares, D], float32.
    """
    pid = tl.program_id(0)
    if pid < WEIGHT_PROGRAMS:
        if WEIGHT_PROGRAMS > 0:
            ROWS: tl.constexpr = 16 if x_ptr.dtype.element_ty == tl.float32 else 64  # tensor cores cut long sums off
            _weight_gradients(
                pid, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr, num_rows, num_shares, D, TILE, ROWS,
                WEIGHT_PRECISION,
            )  # fmt: skip
    else:
        _key_gradients(
            pid - WEIGHT_PROGRAMS, x_ptr, v_ptr, mask_ptr, dh_ptr, dz_ptr, dx_ptr, dv_ptr,
            stride_xb, stride_xh, stride_xl, stride_vb, stride_vh, stride_vl,
            stride_gb, stride_gh, stride_gl, stride_wb, stride_wh, stride_wl,
            Hkv, H_BLOCKS, Lk, k_first, k_end, num_tiles, num_chunks, tiles_per_chunk,
            D, BLOCK_D, BLOCK_N, BLOCK_R, PHI, NUM_HALVES, HAS_MASK, PRECISION,
        )  # fmt: skip


def gradient_dtype(x):
    """Of dM per block and of dH. phi / den of queries whose features next to no key has, and sums of scaled gradients,
    leave float16, although what becomes of them, times phi(k), need not."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def norm_of(k, feature_map):
    return (k.shape[-1] if feature_map in SOFTMAX_MAPS else 1) / k.shape[2]


def linear_bwd_q(run, x, do, m, z, dx, blkq, keep_q, feature_map, eps, per_block, key_mask):
    """Launch the backward of phi(q) M / den. Fills dx in the query blocks.

    Returns dM [B, H, n, D, F], dz [B, H, n, F] and shares [B * H * n, D] of the bias's gradient, float32, of n chunks
    of queries, or of the query blocks when `per_block` (dM in `gradient_dtype` then).
    """
    halves = HALVES[feature_map]
    # Where a mask hides every key z is 0: nothing but eps to divide by.
    usual = not per_block and key_mask is None and halves == 1 and x.dtype != torch.float16
    if usual and all(map(aligned, (x, do, dx))) and takes_gluon(x):
        from .hopper_linear import hopper_linear_bwd_q

        return hopper_linear_bwd_q(run, x, do, m, z, dx, keep_q, feature_map, eps)
    B, H, Lq, D = x.shape
    config = linear_q_config(x, halves)
    block_m = min(blkq, config.rows) if per_block else config.rows
    num_tiles = cdiv(Lq - sum(keep_q), block_m)
    tiles_per_chunk = blkq // block_m if per_block else chunk_size(num_tiles, config.programs, B * H)
    num_chunks = cdiv(num_tiles, tiles_per_chunk)
    dm = run.empty((B, H, num_chunks, D, halves * D), gradient_dtype(x) if per_block else torch.float32)
    dz = run.empty((B, H, num_chunks, halves * D))
    dbias = run.empty((B * H * num_chunks, D))
    BLOCK_R = min(config.block_r, block_d(D))
    run.launch(
        _linear_bwd_q_kernel, (num_chunks, B * H, cdiv(D, BLOCK_R)),
        x, do, m, z, dx, dm, dz, dbias, *x.stride()[:3], *do.stride()[:3], *dx.stride()[:3],
        H, m.shape[1], m.shape[2], keep_q[0], Lq - keep_q[1], num_tiles, tiles_per_chunk, eps,
        D=D, BLOCK_D=block_d(D), BLOCK_M=block_m, BLOCK_R=BLOCK_R, PHI=feature_map, NUM_HALVES=halves,
        PRECISION=rounded_precision(x.dtype), **config.options,
    )  # fmt: skip
    return dm, dz, dbias


def linear_bwd_k(run, x, v, key_mask, dh, dz, dx, dv, blkk, keep_k, feature_map, weights=None):
    """Launch the backward of the sums over keys. Fills dx and dv in the key blocks.

    weights: dM and H [B, Hkv, F, D], shares of b's gradient, and where the gradients of W and b (or None) go; None
    leaves those to others.
    """
    halves = HALVES[feature_map]
    usual = weights is not None and key_mask is None and halves == 1 and x.dtype != torch.float16
    if usual and all(map(aligned, (x, v, dx, dv))) and takes_gluon(x):
        from .hopper_linear import hopper_linear_bwd_k

        hopper_linear_bwd_k(run, x, v, dh, dz, dx, dv, keep_k, feature_map, weights)
        return
    B, Hkv, Lk, D = x.shape
    config_of = linear_k_float16_config if x.dtype == torch.float16 else linear_k_config
    config = config_of(dh, halves)
    per_block = dh.shape[2] > 1
    block_n = min(blkk, config.rows) if per_block else config.rows
    num_tiles = cdiv(Lk - sum(keep_k), block_n)
    tiles_per_chunk = blkk // block_n if per_block else chunk_size(num_tiles, config.programs, B * Hkv)
    num_chunks = cdiv(num_tiles, tiles_per_chunk)
    side, first, num_rows, num_shares = cdiv(D, 32), 0, 0, 0
    if weights is not None:
        first = side * (side if weights[4] is None else side + 1)
        num_rows, num_shares = math.prod(weights[1].shape[:-1]), weights[2].shape[0]
    run.launch(
        _linear_bwd_k_kernel, (first + num_chunks * B * Hkv,),
        x, v, key_mask, dh, dz, dx, dv, *(weights or [None] * 5),
        *x.stride()[:3], *v.stride()[:3], *dx.stride()[:3], *dv.stride()[:3],
        Hkv, dh.shape[2], Lk, keep_k[0], Lk - keep_k[1], num_tiles, num_chunks, tiles_per_chunk, num_rows, num_shares,
        D=D, BLOCK_D=block_d(D), BLOCK_N=block_n, BLOCK_R=min(config.block_r, block_d(D)), PHI=feature_map,
        NUM_HALVES=halves, HAS_MASK=key_mask is not None, PRECISION=rounded_precision(x.dtype),
        WEIGHT_PROGRAMS=first, WEIGHT_PRECISION=PRECISION, TILE=32, **config.options,
    )  # fmt: skip
