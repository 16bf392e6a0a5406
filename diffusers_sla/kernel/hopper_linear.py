"""The backward of linear.py for Hopper, in bfloat16 with sums over all blocks, in Triton's Gluon dialect.

As in hopper.py a tile's place is filled again as soon as it has been read, and copies run while others compute. Not
for float16 (see `gradient_dtype`), key masks, hedgehog, sums of marginal blocks only, and strides that are no
multiples of 16 numbers: those take the Triton kernels.
"""

import functools
import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import _arrived, _load, _phi, _place
from .launch import cdiv

# Programs that the GPU takes at a time, and registers a thread, by head size.
Q_PROGRAMS, Q_REGISTERS = {64: 264, 128: 132}, {64: 168, 128: 255}
K_PROGRAMS, K_REGISTERS = 396, 168


@gluon.jit
def _phi_of(x, PHI: gl.constexpr, end=None):
    """phi of rows that are there as a whole; 0 from row `end` on."""
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    if PHI == "softmax":
        f = _phi(x, gl.max(x, 1), PHI)
        factor = 1.0 / gl.sum(f, 1)
    else:
        f = _phi(x, gl.zeros([x.shape[0]], gl.float32, rows), PHI)
        factor = gl.full([x.shape[0]], 1.0, gl.float32, rows)
    if end is not None:
        factor = gl.where(gl.arange(0, x.shape[0], layout=rows) < end, factor, 0.0)
    return f * factor[:, None]


@gluon.jit
def _phi_backward(f, df, t, PHI: gl.constexpr):
    """Gradient of x from that of f = phi(x); t: sum of f df over the row."""
    if PHI == "softmax":
        dx = f * (df - t[:, None])
    elif PHI == "elu":
        dx = df * gl.minimum(f, 1.0)
    else:
        dx = gl.where(f > 0, df, 0.0)
    return dx


@gluon.jit
def _sum_in_threads(x):
    """A square tile's sums over those of its rows that a thread has of a column, not of all."""
    D: gl.constexpr = x.shape[0]
    return gl.sum(x.reshape([16, D // 16, D]), 1)


@gluon.jit(do_not_specialize=["q_first", "q_end", "tiles_per_chunk", "eps"])
def _hopper_linear_bwd_q_kernel(
    x_ptr, do_ptr, m_ptr, z_ptr, dx_ptr, dm_ptr, dz_ptr, dbias_ptr,
    stride_xb, stride_xh, stride_db, stride_dh, stride_gb, stride_gh,
    H, q_first, q_end, tiles_per_chunk, eps,
    stride_xl: gl.constexpr, stride_dl: gl.constexpr, stride_gl: gl.constexpr,
    M_GROUP: gl.constexpr, D: gl.constexpr, PHI: gl.constexpr,
):  # fmt: skip
    """As `_linear_bwd_q_kernel`, by D queries a step and D // 16 warps."""
    W: gl.constexpr = D // 16
    # 16 bytes of each of its rows a thread, where a warp has the rows that it has in O.
    READ: gl.constexpr = gl.BlockedLayout([D // 16, 8], [256 // D, D // 8], [W, 1], [1, 0])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])  # noqa: E741
    O_COLS: gl.constexpr = gl.SliceLayout(0, O)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    xs = gl.allocate_shared_memory(dtype, [2, D, D], SHARED)
    dos = gl.allocate_shared_memory(dtype, [2, D, D], SHARED)
    fs = gl.allocate_shared_memory(dtype, [D, D], SHARED)
    m = gl.allocate_shared_memory(dtype, [D, D], SHARED)
    zs = gl.allocate_shared_memory(gl.float32, [D], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    chunk = gl.program_id(0)
    b, h = gl.program_id(2).to(gl.int64), gl.program_id(1).to(gl.int64)
    m_head = b * (H // M_GROUP) + h // M_GROUP
    cols = gl.arange(0, D, layout=O_COLS)
    x_tile = _place(stride_xl, D, D, W)
    do_tile = _place(stride_dl, D, D, W)
    dx_tile = _place(stride_gl, D, D, W)
    m_tile = _place(D, D, D, W)
    TILE: gl.constexpr = x_tile.type.layout
    r = gl.arange(0, D, layout=gl.SliceLayout(1, TILE))[:, None]
    first = q_first + chunk * tiles_per_chunk * D
    end = gl.minimum(first + tiles_per_chunk * D, q_end)
    x_base = x_ptr + b * stride_xb + h * stride_xh
    do_base = do_ptr + b * stride_db + h * stride_dh
    dx_base = dx_ptr + b * stride_gb + h * stride_gh
    origin = first.to(gl.int64)
    zs.store(gl.load(z_ptr + m_head * D + cols))
    _load(m, m_ptr + m_head * D * D + m_tile)
    _load(xs.index(0), x_base + origin * stride_xl + x_tile, r < end - first)
    _load(dos.index(0), do_base + origin * stride_dl + do_tile, r < end - first)
    async_copy.commit_group()
    zero = gl.zeros([D, D], gl.float32, O)
    dm = gl.zeros([D, D], gl.float32, O)
    # Sums over rows: of dO as a product with ones, whose columns are equal; of phi(q) in their threads until the end.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    ones = gl.full([D, 8], 1.0, dtype, gl.DotOperandLayout(1, SUMS, 2))
    dbias = gl.zeros([D, 8], gl.float32, SUMS)
    dz = _sum_in_threads(gl.zeros([D, D], gl.float32, READ))
    for start in range(first, end, D):
        slot = (start - first) // D % 2
        x = xs.index(slot)
        do = dos.index(slot)
        at = origin + (start - first)
        more = r < end - start - D
        _load(xs.index(1 - slot), x_base + (at + D) * stride_xl + x_tile, more)
        _load(dos.index(1 - slot), do_base + (at + D) * stride_dl + do_tile, more)
        async_copy.commit_group()
        _arrived(1)
        mdo = warpgroup_mma(do, m.permute((1, 0)), zero, use_acc=False, is_async=True)
        f = x.load(O).to(gl.float32)
        z = zs.load(O_COLS)[None, :]
        if PHI == "softmax":  # its sums are 1, so eps goes to z, and no sum is needed but that of the denominator
            f = _phi(f, gl.max(f, 1), PHI)
            inv = 1.0 / gl.sum(f * (z + eps), 1)
        else:
            f = _phi(f, gl.zeros([D], gl.float32, gl.SliceLayout(1, O)), PHI)
            den = gl.sum(f * z, 1)
            inv = gl.where(den == 0.0, 0.0, 1.0 / (den + eps))
        f = f * inv[:, None]
        fs.store(f.to(dtype))
        fence_async_shared()
        mdo = warpgroup_mma_wait(0, deps=[mdo])
        dm = warpgroup_mma(do.permute((1, 0)), fs, dm, is_async=True)
        # phi . M dO^T is O_l . dO times the denominator: no need of O_l itself.
        g = gl.sum(f * mdo, 1)
        z = zs.load(O_COLS)[None, :]  # again: registers are short
        if PHI == "softmax":
            dx = f * (mdo - g[:, None] * (z + eps))
        elif PHI == "elu":
            dx = gl.minimum(f, inv[:, None]) * (mdo - g[:, None] * z)
        else:
            dx = gl.where(f > 0, inv[:, None], 0.0) * (mdo - g[:, None] * z)
        x.store(dx.to(dtype))
        gl.store(dx_base + at * stride_gl + dx_tile, x.load(TILE), mask=r < end - start)
        dbias = mma_v2(do.permute((1, 0)).load(gl.DotOperandLayout(0, SUMS, 2)), ones, dbias)
        dz -= _sum_in_threads(fs.load(READ).to(gl.float32) * gl.convert_layout(g, gl.SliceLayout(1, READ))[:, None])
        dm = warpgroup_mma_wait(0, deps=[dm])
    async_copy.wait_group(0)
    out = (b * H + h) * gl.num_programs(0) + chunk
    d = gl.arange(0, D, layout=gl.SliceLayout(1, O))
    gl.store(dm_ptr + out * D * D + (d[:, None] * D + cols[None, :]), dm)
    gl.store(dz_ptr + out * D + cols, gl.convert_layout(gl.sum(dz, 0), O_COLS))
    gl.store(dbias_ptr + out * D + cols, gl.convert_layout(gl.max(dbias, 1), O_COLS))


@gluon.jit
def _weight_gradients(pid, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr, num_rows, num_shares, D: gl.constexpr):
    """16 x 16 numbers of dW = dM^T H over all features of all heads; the last programs sum the shares of db."""
    T: gl.constexpr = gl.BlockedLayout([1, 4, 4], [2, 4, 4], [4, 1, 1], [2, 1, 0])
    E: gl.constexpr = gl.SliceLayout(2, T)
    R: gl.constexpr = gl.SliceLayout(1, T)
    e = pid % (D // 16) * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, E))
    d = pid // (D // 16) * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, R))
    re = gl.arange(0, 8, layout=gl.SliceLayout(1, E))[:, None]
    rd = gl.arange(0, 8, layout=gl.SliceLayout(1, R))[:, None]
    if pid < (D // 16) * (D // 16):
        dw = gl.zeros([8, 16, 16], gl.float32, T)
        for start in range(0, num_rows, D):
            for i in gl.static_range(D // 8):
                dm = gl.load(dm_ptr + (start + 8 * i + re) * D + e[None, :])
                h = gl.load(h_ptr + (start + 8 * i + rd) * D + d[None, :])
                dw += dm[:, :, None] * h[:, None, :]
        tile = gl.sum(dw, 0)
        place = gl.arange(0, 16, layout=gl.SliceLayout(1, tile.type.layout))[:, None] * D
        place += gl.arange(0, 16, layout=gl.SliceLayout(0, tile.type.layout))[None, :]
        gl.store(dw_ptr + (pid % (D // 16) * D + pid // (D // 16)) * 16 + place, tile.to(dw_ptr.dtype.element_ty))
    elif dbias_ptr is not None:
        dbias = gl.zeros([8, 16], gl.float32, E)
        for start in range(0, num_shares, 64):
            for i in gl.static_range(8):
                at = start + 8 * i + re
                dbias += gl.load(shares_ptr + at * D + e[None, :], mask=at < num_shares, other=0.0)
        gl.store(dbias_ptr + e, gl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty))


@gluon.jit(do_not_specialize=["k_first", "k_end", "num_programs", "num_chunks", "tiles_per_chunk", "num_rows", "num_shares"])  # fmt: skip  # noqa: E501
def _hopper_linear_bwd_k_kernel(
    x_ptr, v_ptr, dh_ptr, dz_ptr, dx_ptr, dv_ptr, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr,
    stride_xb, stride_xh, stride_vb, stride_vh, stride_gb, stride_gh, stride_wb, stride_wh,
    Hkv, k_first, k_end, num_programs, num_chunks, tiles_per_chunk, num_rows, num_shares,
    stride_xl: gl.constexpr, stride_vl: gl.constexpr, stride_gl: gl.constexpr, stride_wl: gl.constexpr,
    D: gl.constexpr, PHI: gl.constexpr,
):  # fmt: skip
    """As its namesake in linear.py, by 64 keys a step. The weights' programs come last, where others leave room."""
    pid = gl.program_id(0)
    if pid >= num_programs:
        _weight_gradients(pid - num_programs, dm_ptr, h_ptr, shares_ptr, dw_ptr, dbias_ptr, num_rows, num_shares, D)
    else:
        O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741
        OPERAND: gl.constexpr = gl.DotOperandLayout(0, O, 2)
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        dtype: gl.constexpr = x_ptr.dtype.element_ty
        x = gl.allocate_shared_memory(dtype, [64, D], SHARED)
        v = gl.allocate_shared_memory(dtype, [64, D], SHARED)
        dh = gl.allocate_shared_memory(dtype, [D, D], SHARED)
        dzs = gl.allocate_shared_memory(gl.float32, [D], gl.SwizzledSharedLayout(1, 1, 1, [0]))

        chunk = pid % num_chunks
        bh = pid // num_chunks
        b, h = (bh // Hkv).to(gl.int64), (bh % Hkv).to(gl.int64)
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, O))
        x_tile = _place(stride_xl, D)
        v_tile = _place(stride_vl, D)
        dx_tile = _place(stride_gl, D)
        dv_tile = _place(stride_wl, D)
        TILE: gl.constexpr = x_tile.type.layout
        r = gl.arange(0, 64, layout=gl.SliceLayout(1, TILE))[:, None]
        x_base = x_ptr + b * stride_xb + h * stride_xh
        v_base = v_ptr + b * stride_vb + h * stride_vh
        dx_base = dx_ptr + b * stride_gb + h * stride_gh
        dv_base = dv_ptr + b * stride_wb + h * stride_wh
        first = k_first + chunk * tiles_per_chunk * 64
        end = gl.minimum(first + tiles_per_chunk * 64, k_end)
        origin = first.to(gl.int64)
        dzs.store(gl.load(dz_ptr + bh * D + cols))
        for part in gl.static_range(D // 64):
            _load(dh.slice(part * 64, 64), dh_ptr + bh.to(gl.int64) * D * D + part * 64 * D + _place(D, D))
        _load(x, x_base + origin * stride_xl + x_tile, r < end - first)
        _load(v, v_base + origin * stride_vl + v_tile, r < end - first)
        async_copy.commit_group()
        zero = gl.zeros([64, D], gl.float32, O)
        for start in range(first, end, 64):
            at = origin + (start - first)
            inside = r < end - start
            more = r < end - start - 64
            _arrived(0)
            df = warpgroup_mma(v, dh.permute((1, 0)), zero, use_acc=False, is_async=True)
            f = x.load(O).to(gl.float32)
            _load(x, x_base + (at + 64) * stride_xl + x_tile, more)
            f = _phi_of(f, PHI)
            df = warpgroup_mma_wait(0, deps=[df])
            operand = gl.convert_layout(f.to(dtype), OPERAND)
            df += dzs.load(cols.type.layout)[None, :]
            dx = _phi_backward(f, df, gl.sum(f * df, 1), PHI)
            # The values have been read: their place takes what goes out in rows.
            v.store(dx.to(dtype))
            dv = warpgroup_mma(operand, dh, zero, use_acc=False, is_async=True)
            gl.store(dx_base + at * stride_gl + dx_tile, v.load(TILE), mask=inside)
            dv = warpgroup_mma_wait(0, deps=[dv])
            v.store(dv.to(dtype))
            gl.store(dv_base + at * stride_wl + dv_tile, v.load(TILE), mask=inside)
            _load(v, v_base + (at + 64) * stride_vl + v_tile, more)
            async_copy.commit_group()
        async_copy.wait_group(0)


@functools.lru_cache(maxsize=None)
def tiles_of_a_program(num_tiles, heads, programs):
    """For the fewest steps, if `programs` run at a time and each takes one more to begin and end."""
    steps = {n: cdiv(cdiv(num_tiles, n) * heads, programs) * (n + 1) for n in range(1, num_tiles + 1)}
    return min(steps, key=lambda n: steps[n])


def hopper_linear_bwd_q(run, x, do, m, z, dx, keep_q, feature_map, eps):
    """`linear_bwd_q` of a call that this kernel takes."""
    B, H, Lq, D = x.shape
    num_tiles = cdiv(Lq - sum(keep_q), D)
    tiles_per_chunk = tiles_of_a_program(num_tiles, B * H, Q_PROGRAMS[D])
    num_chunks = cdiv(num_tiles, tiles_per_chunk)
    dm = run.empty((B, H, num_chunks, D, D), torch.float32)
    dz = run.empty((B, H, num_chunks, D))
    dbias = run.empty((B * H * num_chunks, D))
    run.launch(
        _hopper_linear_bwd_q_kernel, (num_chunks, H, B),
        x, do, m, z, dx, dm, dz, dbias, *x.stride()[:2], *do.stride()[:2], *dx.stride()[:2],
        H, keep_q[0], Lq - keep_q[1], tiles_per_chunk, eps,
        stride_xl=x.stride()[2], stride_dl=do.stride()[2], stride_gl=dx.stride()[2],
        M_GROUP=H // m.shape[1], D=D, PHI=feature_map, num_warps=D // 16, maxnreg=Q_REGISTERS[D],
    )  # fmt: skip
    return dm, dz, dbias


def hopper_linear_bwd_k(run, x, v, dh, dz, dx, dv, keep_k, feature_map, weights):
    """`linear_bwd_k` of a call that this kernel takes."""
    B, Hkv, Lk, D = x.shape
    num_tiles = cdiv(Lk - sum(keep_k), 64)
    tiles_per_chunk = tiles_of_a_program(num_tiles, B * Hkv, K_PROGRAMS)
    num_chunks = cdiv(num_tiles, tiles_per_chunk)
    num_programs, side = num_chunks * B * Hkv, D // 16
    run.launch(
        _hopper_linear_bwd_k_kernel, (num_programs + side * (side if weights[4] is None else side + 1),),
        x, v, dh, dz, dx, dv, *weights, *x.stride()[:2], *v.stride()[:2], *dx.stride()[:2], *dv.stride()[:2],
        Hkv, keep_k[0], Lk - keep_k[1], num_programs, num_chunks, tiles_per_chunk, math.prod(weights[1].shape[:-1]),
        weights[2].shape[0],
        stride_xl=x.stride()[2], stride_vl=v.stride()[2], stride_gl=dx.stride()[2], stride_wl=dv.stride()[2],
        D=D, PHI=feature_map, num_warps=4, maxnreg=K_REGISTERS,
    )  # fmt: skip
