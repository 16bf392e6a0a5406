"""Sums over chunks of keys or queries, and their product with the weight: one [D, D] matrix a head."""

import triton
import triton.language as tl

from .forward import dot_over_d
from .launch import block_d, cdiv, projected_columns, rounded_precision, summed_stages


@triton.jit
def project(
    pid, sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr, num_chunks, factor,
    F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_F features of a head: total = the sum of the chunks; product = factor * total @ W^T (TRANSPOSE) or
    factor * total @ W; z likewise."""
    BLOCK_F: tl.constexpr = 16
    TILES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    EXACT: tl.constexpr = product_ptr.dtype.element_ty == tl.float32
    head = (pid // TILES).to(tl.int64)
    f = pid % TILES * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    inside = (f[:, None] < F) & (d[None, :] < D)
    e = tl.arange(0, BLOCK_E)
    w = _weight_tile(w_ptr, d, e, D, TRANSPOSE)  # before the chunks, so that it comes at the same time
    total = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    z = tl.zeros([BLOCK_F], tl.float32)
    for chunk in tl.range(head * num_chunks, (head + 1) * num_chunks, num_stages=STAGES):
        total += tl.load(sums_ptr + (chunk * D + d[None, :]) * F + f[:, None], mask=inside, other=0.0)
        z += tl.load(z_ptr + chunk * F + f, mask=f < F, other=0.0)
    tl.store(total_ptr + (head * F + f)[:, None] * D + d[None, :], total, mask=inside)
    tl.store(z_total_ptr + head * F + f, z * factor, mask=f < F)
    for first in tl.static_range(0, D, BLOCK_E):
        if first > 0:
            e += BLOCK_E
            w = _weight_tile(w_ptr, d, e, D, TRANSPOSE)
        product = dot_over_d(total, w, EXACT, PRECISION) * factor
        ptrs = product_ptr + (head * F + f)[:, None] * D + e[None, :]
        tl.store(ptrs, product.to(product_ptr.dtype.element_ty), mask=(f[:, None] < F) & (e[None, :] < D))


@triton.jit
def _weight_tile(w_ptr, d, e, D: tl.constexpr, TRANSPOSE: tl.constexpr):
    if TRANSPOSE:
        ptrs = w_ptr + e[None, :] * D + d[:, None]
    else:
        ptrs = w_ptr + d[:, None] * D + e[None, :]
    return tl.load(ptrs, mask=(e[None, :] < D) & (d[:, None] < D), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_chunks", "factor"])
def _project_sums_kernel(
    sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr, num_chunks, factor,
    F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (heads * cdiv(F, 16),). sums: [heads, num_chunks, D, F], z: [heads, num_chunks, F], w: [D, D]."""
    project(
        tl.program_id(0), sums_ptr, z_ptr, w_ptr, total_ptr, product_ptr, z_total_ptr, num_chunks, factor,
        F, D, BLOCK_D, BLOCK_E, STAGES, TRANSPOSE, PRECISION,
    )  # fmt: skip


def projection(sums, heads):
    """Features, chunks of a head and programs of the product of the sums [B, .., D, F] of B * heads heads."""
    B, F = sums.shape[0], sums.shape[4]
    return F, sums.shape[1] * sums.shape[2] // heads, B * heads * cdiv(F, 16)


def project_sums(run, sums, z, weight, total, product, z_total, heads, transpose, factor):
    """Launch the sum over the chunks of B * heads heads: fills total [.., F, D] and z_total [.., F], float32, and the
    product with the weight [.., F, D]."""
    D = sums.shape[3]
    F, num_chunks, programs = projection(sums, heads)
    run.launch(
        _project_sums_kernel, (programs,), sums, z, weight, total, product, z_total, num_chunks, factor,
        F=F, D=D, BLOCK_D=block_d(D), BLOCK_E=projected_columns(product), STAGES=summed_stages(product),
        TRANSPOSE=transpose, PRECISION=rounded_precision(product.dtype),
        num_warps=8, num_stages=2,
    )  # fmt: skip
