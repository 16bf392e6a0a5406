"""The linear branch around the kernels: its sums, and its backward.

With norm = D / Lk, which keeps sums over any length inside float16:
H = norm sum phi(k)^T v,  z = norm sum phi(k),  M = H W^T,  O_l W^T = phi(q) M / (phi(q) z + norm 1e-5)   (eq. 5, 6).
So W only ever multiplies [D, D] matrices, and the kernels know nothing of it. H and M are per key head when every
block is summed ("all"), per query block when only the marginal ones are.
"""

import torch
import triton
import triton.language as tl

from .features import HALVES, phi_stats, phi_tile, phi_tile_backward
from .launch import PRECISION, block_d, linear_config, prepare_config

EPS = 1e-5


@triton.jit(do_not_specialize=["Lq", "q_first", "q_end", "eps"])
def _linear_bwd_q_kernel(
    x_ptr, do_ptr, m_ptr, z_ptr, inv_ptr, dden_ptr, dx_ptr,
    stride_xb, stride_xh, stride_xl, stride_db, stride_dh, stride_dl, stride_gb, stride_gh, stride_gl,
    H, M_HEADS, M_BLOCKS, Lq, q_first, q_end, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of phi's input x for one query block; keeps 1 / denominator and its gradient for dM.

    Grid: (num_q_blocks, B * H). m: [B, M_HEADS, M_BLOCKS, NUM_HALVES * D, D], z: [.., NUM_HALVES * D] float32.
    inv, dden: [B, H, Lq] float32. dx: strides g.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    cols = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    rows = q_first + block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < q_end
    inside = row_valid[:, None] & (cols[None, :] < D)
    at = rows.to(tl.int64)[:, None]
    x_base = x_ptr + b * stride_xb + h * stride_xh + at * stride_xl
    x = tl.load(x_base + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + b * stride_db + h * stride_dh + at * stride_dl + cols[None, :], mask=inside, other=0.0)
    top, total = phi_stats(x, cols[None, :] < D, PHI)
    m_head = b * M_HEADS + h // (H // M_HEADS)
    m_at = m_head * M_BLOCKS + tl.where(M_BLOCKS == 1, 0, block)

    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    den = tl.zeros([BLOCK_M], tl.float32)
    for half in tl.static_range(NUM_HALVES):
        for first in range(0, D, BLOCK_R):
            part = first + r
            x_part = tl.load(x_base + part[None, :], mask=row_valid[:, None] & (part[None, :] < D), other=0.0)
            f = phi_tile(x_part.to(tl.float32), top, total, part[None, :] < D, PHI, half)
            feature = (m_at * NUM_HALVES + half) * D + part
            z = tl.load(z_ptr + feature, mask=part < D, other=0.0)
            m = tl.load(m_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
            den += tl.sum(f * z[None, :], 1)
            y = tl.dot(f.to(m.dtype), m, y, input_precision=PRECISION)
    inv = 1.0 / (den + eps)
    g = tl.sum(y * do.to(tl.float32), 1) * inv
    dden = -g * inv
    t = g * (1.0 - den * inv)  # sum of phi * dphi over the row
    tl.store(inv_ptr + bh * Lq + rows, inv, mask=row_valid)
    tl.store(dden_ptr + bh * Lq + rows, dden, mask=row_valid)

    dy = (do.to(tl.float32) * inv[:, None]).to(do.dtype)
    for first in range(0, D, BLOCK_R):
        part = first + r
        part_inside = row_valid[:, None] & (part[None, :] < D)
        x_part = tl.load(x_base + part[None, :], mask=part_inside, other=0.0).to(tl.float32)
        dx = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for half in tl.static_range(NUM_HALVES):
            f = phi_tile(x_part, top, total, part[None, :] < D, PHI, half)
            feature = (m_at * NUM_HALVES + half) * D + part
            z = tl.load(z_ptr + feature, mask=part < D, other=0.0)
            m = tl.load(m_ptr + feature[None, :] * D + cols[:, None], mask=(part[None, :] < D) & (cols[:, None] < D), other=0.0)  # fmt: skip  # noqa: E501
            df = tl.dot(dy, m, input_precision=PRECISION) + dden[:, None] * z[None, :]
            dx += phi_tile_backward(x_part, f, df, t, PHI, half)
        dx_ptrs = dx_ptr + b * stride_gb + h * stride_gh + at * stride_gl + part[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=part_inside)


@triton.jit(do_not_specialize=["Lq", "q_first", "q_end", "num_q_blocks", "blocks_per_chunk"])
def _linear_bwd_m_kernel(
    x_ptr, do_ptr, inv_ptr, dden_ptr, dm_ptr, dz_ptr,
    stride_xb, stride_xh, stride_xl, stride_db, stride_dh, stride_dl,
    H, Lq, q_first, q_end, num_q_blocks, blocks_per_chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dM = phi(q)^T (dO / den) and dz = phi(q)^T dden, summed over a chunk of query blocks.

    Grid: (num_chunks, B * H, NUM_HALVES * cdiv(D, BLOCK_R)).
    dm: [B, H, num_chunks, NUM_HALVES * D, D], dz: [B, H, num_chunks, NUM_HALVES * D] float32.
    """
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    NUM_R: tl.constexpr = (D + BLOCK_R - 1) // BLOCK_R
    half = tl.program_id(2) // NUM_R
    part = (tl.program_id(2) % NUM_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dz = tl.zeros([BLOCK_R], tl.float32)
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, num_q_blocks)):
        rows = q_first + block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = rows < q_end
        inside = row_valid[:, None] & (cols[None, :] < D)
        at = rows.to(tl.int64)[:, None]
        x_base = x_ptr + b * stride_xb + h * stride_xh + at * stride_xl
        x = tl.load(x_base + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        top, total = phi_stats(x, cols[None, :] < D, PHI)
        x_part = tl.load(x_base + part[None, :], mask=row_valid[:, None] & (part[None, :] < D), other=0.0)
        x_part = x_part.to(tl.float32)
        part_valid = row_valid[:, None] & (part[None, :] < D)
        f = phi_tile(x_part, top, total, part_valid, PHI, 0)
        if NUM_HALVES == 2:
            f = tl.where(half == 0, f, phi_tile(x_part, top, total, part_valid, PHI, 1))
        inv = tl.load(inv_ptr + bh * Lq + rows, mask=row_valid, other=0.0)
        dden = tl.load(dden_ptr + bh * Lq + rows, mask=row_valid, other=0.0)
        do = tl.load(do_ptr + b * stride_db + h * stride_dh + at * stride_dl + cols[None, :], mask=inside, other=0.0)
        dy = (do.to(tl.float32) * inv[:, None]).to(do.dtype)
        acc = tl.dot(tl.trans(f).to(do.dtype), dy, acc, input_precision=PRECISION)
        dz += tl.sum(f * dden[:, None], 0)
    feature = ((bh * tl.num_programs(0) + chunk) * NUM_HALVES + half) * D + part
    stored = (part[:, None] < D) & (cols[None, :] < D)
    tl.store(dm_ptr + feature[:, None] * D + cols[None, :], acc.to(dm_ptr.dtype.element_ty), mask=stored)
    tl.store(dz_ptr + feature, dz, mask=part < D)


@triton.jit(do_not_specialize=["Lk", "k_first", "k_end"])
def _linear_bwd_k_kernel(
    x_ptr, v_ptr, mask_ptr, dh_ptr, dz_ptr, dx_ptr, dv_ptr,
    stride_xb, stride_xh, stride_xl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_wb, stride_wh, stride_wl,
    Hkv, H_BLOCKS, Lk, k_first, k_end,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PHI: tl.constexpr, NUM_HALVES: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of phi's input x and of v for one key block, from dh = norm dH and dz = norm dz.

    Grid: (num_k_blocks, B * Hkv). dh: [B, Hkv, H_BLOCKS, NUM_HALVES * D, D], dz: [.., NUM_HALVES * D] float32;
    H_BLOCKS is 1 or num_k_blocks. dx: strides g, dv: strides w.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // Hkv
    h = bh % Hkv
    cols = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    rows = k_first + block * BLOCK_N + tl.arange(0, BLOCK_N)
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
    h_at = bh * H_BLOCKS + tl.where(H_BLOCKS == 1, 0, block)

    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    t = tl.zeros([BLOCK_N], tl.float32)
    for half in tl.static_range(NUM_HALVES):
        for first in range(0, D, BLOCK_R):
            part = first + r
            part_valid = visible[:, None] & (part[None, :] < D)
            x_part = tl.load(x_base + part[None, :], mask=part_valid, other=0.0).to(tl.float32)
            f = phi_tile(x_part, top, total, part_valid, PHI, half)
            feature = (h_at * NUM_HALVES + half) * D + part
            dz = tl.load(dz_ptr + feature, mask=part < D, other=0.0)
            dh = tl.load(dh_ptr + feature[:, None] * D + cols[None, :], mask=(part[:, None] < D) & (cols[None, :] < D), other=0.0)  # fmt: skip  # noqa: E501
            dv = tl.dot(f.to(dh.dtype), dh, dv, input_precision=PRECISION)
            t += tl.sum(f * dz[None, :], 1)
    t += tl.sum(v.to(tl.float32) * dv, 1)
    stored = row_valid[:, None] & (cols[None, :] < D)
    dv_ptrs = dv_ptr + b * stride_wb + h * stride_wh + at * stride_wl + cols[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=stored)

    for first in range(0, D, BLOCK_R):
        part = first + r
        part_valid = visible[:, None] & (part[None, :] < D)
        x_part = tl.load(x_base + part[None, :], mask=part_valid, other=0.0).to(tl.float32)
        dx = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for half in tl.static_range(NUM_HALVES):
            f = phi_tile(x_part, top, total, part_valid, PHI, half)
            feature = (h_at * NUM_HALVES + half) * D + part
            dz = tl.load(dz_ptr + feature, mask=part < D, other=0.0)
            dh = tl.load(dh_ptr + feature[None, :] * D + cols[:, None], mask=(part[None, :] < D) & (cols[:, None] < D), other=0.0)  # fmt: skip  # noqa: E501
            df = tl.dot(v, dh, input_precision=PRECISION) + dz[None, :]
            dx += phi_tile_backward(x_part, f, df, t, PHI, half)
        dx = tl.where(visible[:, None], dx, 0.0)
        dx_ptrs = dx_ptr + b * stride_gb + h * stride_gh + at * stride_gl + part[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=row_valid[:, None] & (part[None, :] < D))


def norm_of(q, k):
    return q.shape[-1] / k.shape[2]


def marginal_rows(block_map, num_kv_heads, dtype):
    """0/1 matrix [B, Hkv, H // Hkv * num_q_blocks, num_k_blocks] of the marginal blocks."""
    B, H, num_q_blocks, num_k_blocks = block_map.shape
    return (block_map == 0).to(dtype).view(B, num_kv_heads, H // num_kv_heads * num_q_blocks, num_k_blocks)


def gather_sums(sums, z, block_map, weight, dtype):
    """What the forward kernel needs: m [B, heads, blocks, F, D] in `dtype` and z [B, heads, blocks, F] float32.

    sums, z: from `prepare`. block_map: None for "all". Also returns h = sums over all blocks [B, Hkv, F, D] for "all".
    """
    B, Hkv, _, F, D = sums.shape
    if block_map is None:
        h = sums.sum(2)
        m = (h @ weight.float().t()).to(dtype)
        return m.unsqueeze(2), z.sum(2, keepdim=True), h
    H, num_q_blocks, num_k_blocks = block_map.shape[1:]
    rows = marginal_rows(block_map, Hkv, dtype)
    projected = sums @ weight.to(dtype).t()
    m = (rows @ projected.view(B, Hkv, num_k_blocks, F * D)).view(B, H, num_q_blocks, F, D)
    z = (rows.float() @ z).view(B, H, num_q_blocks, F)
    return m, z, None


def linear_bwd_q(x, do, m, z, dx, blkq, keep_q, feature_map, eps, per_block):
    """Launch the backward of phi(q) M / den. Fills dx in the query blocks; returns dM [B, H, n, F, D] and dz, float32.

    n is 1, or num_q_blocks when `per_block` (dM in x's dtype then).
    """
    B, H, Lq, D = x.shape
    num_q_blocks = triton.cdiv(Lq - sum(keep_q), blkq)
    config = linear_config(x)
    halves = HALVES[feature_map]
    inv, dden = torch.empty((2, B, H, Lq), device=x.device, dtype=torch.float32)
    tiles = dict(
        D=D, BLOCK_D=block_d(D), BLOCK_M=blkq, BLOCK_R=min(config.block_r, block_d(D)), PHI=feature_map,
        NUM_HALVES=halves, PRECISION=PRECISION, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    strides = (*x.stride()[:3], *do.stride()[:3])
    _linear_bwd_q_kernel[(num_q_blocks, B * H)](
        x, do, m, z, inv, dden, dx, *strides, *dx.stride()[:3],
        H, m.shape[1], m.shape[2], Lq, keep_q[0], Lq - keep_q[1], eps, **tiles,
    )  # fmt: skip
    num_chunks = num_q_blocks if per_block else max(1, min(num_q_blocks, prepare_config(x, feature_map).programs // (B * H)))  # fmt: skip  # noqa: E501
    blocks_per_chunk = triton.cdiv(num_q_blocks, num_chunks)
    num_chunks = triton.cdiv(num_q_blocks, blocks_per_chunk)
    dtype = x.dtype if per_block else torch.float32
    dm = torch.empty((B, H, num_chunks, halves * D, D), device=x.device, dtype=dtype)
    dz = torch.empty((B, H, num_chunks, halves * D), device=x.device, dtype=torch.float32)
    _linear_bwd_m_kernel[(num_chunks, B * H, halves * triton.cdiv(D, tiles["BLOCK_R"]))](
        x, do, inv, dden, dm, dz, *strides, H, Lq, keep_q[0], Lq - keep_q[1], num_q_blocks, blocks_per_chunk, **tiles,
    )  # fmt: skip
    if per_block:
        return dm, dz
    return dm.sum(2, keepdim=True), dz.sum(2, keepdim=True)


def scatter_sums_backward(dm, dz, block_map, weight, h, sums, num_kv_heads, norm):
    """From dM, dz per query head back to norm dH, norm dz per key head (and key block), and dW.

    h: sums over all blocks for "all"; sums: per key block for "marginal".
    """
    B, H, _, F, D = dm.shape
    Hkv = num_kv_heads
    if block_map is None:
        dm = dm.view(B, Hkv, H // Hkv, F, D).sum(2)
        dz = dz.view(B, Hkv, H // Hkv, F).sum(2)
        dweight = torch.einsum("bhfe,bhfd->ed", dm, h)
        return (dm @ weight.float() * norm).unsqueeze(2), (dz * norm).unsqueeze(2), dweight
    num_k_blocks = block_map.shape[-1]
    columns = marginal_rows(block_map, Hkv, dm.dtype).transpose(2, 3)
    dm = (columns @ dm.view(B, Hkv, -1, F * D)).view(B, Hkv, num_k_blocks, F, D)
    dz = columns.float() @ dz.view(B, Hkv, -1, F)
    dweight = (dm.flatten(2, 3).mT @ sums.flatten(2, 3)).float().sum((0, 1))
    return dm @ weight.to(dm.dtype) * norm, dz * norm, dweight


def linear_bwd_k(x, v, key_mask, dh, dz, dx, dv, blkk, keep_k, feature_map):
    """Launch the backward of the sums over keys. Fills dx and dv in the key blocks."""
    B, Hkv, Lk, D = x.shape
    config = linear_config(x)
    _linear_bwd_k_kernel[(triton.cdiv(Lk - sum(keep_k), blkk), B * Hkv)](
        x, v, key_mask, dh.to(x.dtype), dz, dx, dv,
        *x.stride()[:3], *v.stride()[:3], *dx.stride()[:3], *dv.stride()[:3],
        Hkv, dh.shape[2], Lk, keep_k[0], Lk - keep_k[1],
        D=D, BLOCK_D=block_d(D), BLOCK_N=blkk, BLOCK_R=min(config.block_r, block_d(D)), PHI=feature_map,
        NUM_HALVES=HALVES[feature_map], HAS_MASK=key_mask is not None, PRECISION=PRECISION,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
