"""phi of the linear branch and its derivative, on tiles in registers.

A tile x is [rows, features] float32. "hedgehog" has two halves, exp(x) and exp(-x) under one sum; the others have one.
Softmax-like maps need a maximum and a sum over the whole row: `phi_stats` takes the whole row, then `phi_tile` serves
any tile of its columns.
"""

import triton
import triton.language as tl

HALVES = {"softmax": 1, "elu": 1, "relu": 1, "hedgehog": 2}


@triton.jit
def _exp(x, top):
    """exp(x - top) by exp2, whose GPU instruction flushes denormal numbers: tl.exp spends four instructions on them.
    One product with a sum; what rounds off of the row's top is a factor of the whole row."""
    return tl.exp2(x * 1.4426950408889634 - (top * 1.4426950408889634)[:, None])


@triton.jit
def operand(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """x float32 as dtype. Where float32 stands for float16 (not EXACT), rounded to the bits that tensor cores read as
    tf32, as many as float16's: what they would do is cut off, and sums of that lean to one side."""
    if dtype == tl.float32 and not EXACT:
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return x.to(dtype)


@triton.jit
def phi_stats(x, valid, PHI: tl.constexpr):
    """Row maximum and row total of a softmax-like phi: two [rows] vectors. `valid` [1, columns] masks padding."""
    if PHI == "softmax":
        top = tl.max(tl.where(valid, x, float("-inf")), 1)
        total = tl.sum(tl.where(valid, _exp(x, top), 0.0), 1)
    elif PHI == "hedgehog":
        top = tl.max(tl.where(valid, tl.abs(x), 0.0), 1)
        both = _exp(x, top) + _exp(-x, top)
        total = tl.sum(tl.where(valid, both, 0.0), 1)
    else:
        top = tl.zeros([x.shape[0]], tl.float32)
        total = top + 1.0
    return top, total


@triton.jit
def phi_tile(x, top, valid, PHI: tl.constexpr, HALF: tl.constexpr):
    """phi of a tile before the division by the row's total; 0 where not `valid`."""
    if PHI == "softmax":
        f = _exp(x, top)
    elif PHI == "hedgehog":
        if HALF == 0:
            f = _exp(x, top)
        else:
            f = _exp(-x, top)
    elif PHI == "elu":
        f = tl.where(x > 0, x + 1.0, _exp(tl.minimum(x, 0.0), top))
    else:
        f = tl.maximum(x, 0.0)
    return tl.where(valid, f, 0.0)


@triton.jit
def phi_tile_backward(x, f, df, t, PHI: tl.constexpr, HALF: tl.constexpr):
    """Gradient of x from that of a tile f = phi(x); t [rows] is sum(f * df) over the whole row, both halves."""
    if PHI == "softmax":
        dx = f * (df - t[:, None])
    elif PHI == "hedgehog":
        dx = f * (df - t[:, None])
        if HALF == 1:
            dx = -dx
    elif PHI == "elu":
        dx = df * tl.where(x > 0, 1.0, f)
    else:
        dx = df * tl.where(x > 0, 1.0, 0.0)
    return dx
