"""How a GPU rounds float32, for Triton's interpreter: what is exact there hides what fails on the card.

Its exp2 and log2 are good to 2^-22.
"""

import numpy as np
from triton.runtime import interpreter


def _off_by(function, relative, rng):
    def approximate(self, x):
        y = function(x.data.astype(np.float64))
        off = rng.uniform(-(2.0**-22), 2.0**-22, y.shape)
        return interpreter.TensorHandle((y * (1 + off) if relative else y + off).astype(x.data.dtype), x.dtype.scalar)

    return approximate


def use(monkeypatch):
    """Round like a GPU until the test ends."""
    builder, rng = interpreter.InterpreterBuilder, np.random.default_rng(0)
    monkeypatch.setattr(builder, "create_exp2", _off_by(np.exp2, True, rng))
    monkeypatch.setattr(builder, "create_log2", _off_by(np.log2, False, rng))
