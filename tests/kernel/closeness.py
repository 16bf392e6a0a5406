"""The rule every numerical test follows: no worse than plain torch in the same dtype, measured against float64."""

import torch


def assert_no_worse_than_eager(name, actual, plain, exact, factor=2.0):
    """Largest error of `actual` against float64 `exact` <= factor * that of `plain` + one rounding."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error, allowed = ((x.double() - exact).abs().max() for x in (actual, plain))
    rounding = torch.finfo(plain.dtype).eps * exact.abs().max()
    assert error <= factor * allowed + rounding, f"{name}: {error:.2e} > {factor} * {allowed:.2e} + {rounding:.2e}"
