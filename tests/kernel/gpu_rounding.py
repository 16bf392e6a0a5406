"""How a GPU rounds float32, for Triton's interpreter: what is exact there hides what fails on the card.

Products are three of tf32 halves, their sums are cut off, eight at a time, and exp2 and log2 are good to 2^-22.
"""

import numpy as np
from triton.runtime import interpreter


def _tf32(x, nearest):
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x1000) if nearest else bits) & np.uint32(0xFFFFE000)).view(np.float32)


def _towards_zero(x):
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def _multiply_add(a, b, c):
    for i in range(0, a.shape[1], 8):
        c = _towards_zero(a[:, i : i + 8].astype(np.float64) @ b[i : i + 8].astype(np.float64) + c)
    return c


def _dot(exact):
    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.data.dtype != np.float32:
            return exact(self, a, b, d, input_precision, max_num_imprecise_acc)
        (a_high, a_low), (b_high, b_low) = (
            (high := _tf32(x.data, True), _tf32(x.data - high, False)) for x in (a, b)
        )  # fmt: skip
        product = np.zeros_like(d.data)
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            product = _multiply_add(x, y, product)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return dot


def _off_by(function, relative, rng):
    def approximate(self, x):
        y = function(x.data.astype(np.float64))
        off = rng.uniform(-(2.0**-22), 2.0**-22, y.shape)
        return interpreter.TensorHandle((y * (1 + off) if relative else y + off).astype(x.data.dtype), x.dtype.scalar)

    return approximate


def use(monkeypatch):
    """Round like a GPU until the test ends."""
    builder, rng = interpreter.InterpreterBuilder, np.random.default_rng(0)
    monkeypatch.setattr(builder, "create_dot", _dot(builder.create_dot))
    monkeypatch.setattr(builder, "create_exp2", _off_by(np.exp2, True, rng))
    monkeypatch.setattr(builder, "create_log2", _off_by(np.log2, False, rng))
