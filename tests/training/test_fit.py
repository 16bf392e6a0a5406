import pytest
import torch

from diffusers_sla.training.fit import Moments, fit_layer

D = 6


def sums(o_s, o_l, o):
    moments = Moments(D, o_l is not None)
    half = len(o) // 2  # added in parts
    for rows in (slice(0, half), slice(half, None)):
        moments.add(o_s[rows], None if o_l is None else o_l[rows], o[rows])
    return moments


def problem(rows, seed=0, noise=0.0, A=None, W=None, b=None, linear=True):
    generator = torch.Generator().manual_seed(seed)
    o_s, o_l, error = torch.randn(3, rows, D, generator=generator)
    o = o_s @ (torch.eye(D) if A is None else A).T + noise * error
    if W is not None:
        o = o + o_l @ W.T + b
    return sums(o_s, o_l if linear else None, o)


def test_moments_are_those_of_the_rows():
    o_s, o_l, o = torch.randn(3, 5000, D)
    z = torch.cat([o_s, o_l, torch.ones(5000, 1), o], 1).double()
    moments = sums(o_s, o_l, o)
    assert moments.rows == 5000
    torch.testing.assert_close(moments.sum, z.T @ z, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="o_l must be given"):
        moments.add(o_s, None, o)


def test_weights_that_made_the_data_are_found():
    A, W, b = torch.randn(D, D), torch.randn(D, D), torch.randn(D)
    fit = fit_layer(problem(4000, 0, A=A, W=W, b=b), problem(2000, 1, A=A, W=W, b=b))
    for found, true in ((fit.proj_s, A), (fit.proj_l, W), (fit.bias, b)):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)
    assert fit.error_after < 1e-3 < fit.error_before
    assert fit.ridge_s == fit.ridge_l == 1e-6


def test_a_layer_that_nothing_helps_stays_as_it_is():
    fit = fit_layer(problem(60, 0, noise=1.0), problem(4000, 1, noise=1.0))
    assert fit.proj_s is fit.proj_l is fit.bias is fit.ridge_s is fit.ridge_l is None
    assert fit.error_before == fit.error_after == pytest.approx(0.5**0.5, abs=0.02)


def test_only_the_branch_that_helps_is_kept():
    W, b = torch.randn(D, D), torch.randn(D)
    fit = fit_layer(problem(4000, 0, W=W, b=b, noise=0.5), problem(4000, 1, W=W, b=b, noise=0.5))
    assert fit.proj_s is None
    torch.testing.assert_close(fit.proj_l, W, rtol=0.1, atol=0.1)
    A = torch.randn(D, D)
    fit = fit_layer(problem(4000, 0, A=A, noise=0.5), problem(4000, 1, A=A, noise=0.5))
    assert fit.proj_l is fit.bias is None
    torch.testing.assert_close(fit.proj_s, A, rtol=0.1, atol=0.1)


def test_scarce_data_is_pulled_to_the_identity():
    A = torch.eye(D) + 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    fit = fit_layer(problem(8, 0, A=A, noise=1.0), problem(4000, 1, A=A, noise=1.0))
    assert fit.ridge_s is None or fit.ridge_s >= 0.1
    assert fit.error_after <= fit.error_before
    assert fit.error_fitted < fit.error_after


def test_without_a_linear_branch_only_proj_s_is_fitted():
    A = torch.randn(D, D)
    fit = fit_layer(problem(4000, 0, A=A, linear=False), problem(400, 1, A=A, linear=False))
    torch.testing.assert_close(fit.proj_s, A, rtol=1e-3, atol=1e-3)
    assert fit.proj_l is None


def test_precision_survives_autocast():
    o_s, o_l, o = torch.randn(3, 3000, D)
    with torch.autocast("cpu", torch.bfloat16):
        moments = sums(o_s, o_l, o)
    torch.testing.assert_close(moments.sum, sums(o_s, o_l, o).sum, rtol=0, atol=0)
