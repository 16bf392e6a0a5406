"""The projections of one layer in closed form: least squares from second moments of its branches.

`min ||O - (O_s A^T + O_l W^T + b)||^2` over tokens, heads and denoising steps, where O is full attention and O_s, O_l
are the branches of eq. 6. All that is needed of them is one matrix of second moments, so the memory does not grow with
what is seen. A ridge pulls A to the identity and W, b to zero, each with its own strength; the strengths, and whether
A and W are used at all, are chosen by the error on samples that were not fitted.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Strength of a ridge, as a share of the mean square of what it weighs. None: fixed where the ridge pulls to.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, None)
# A fit has to do this much better on held-out samples than a simpler one to be worth its weights.
WORTH = 1e-3
ROWS = 2048  # whose products are summed in float32 before they join the float64 sum


class Moments:
    """Sum of z^T z over rows z = [O_s, O_l, 1, O], float64; without O_l and 1 where there is no linear branch.

    Symmetric [F, F] with F = 3 D + 1 (2 D): about a megabyte per layer for head size 128.
    """

    def __init__(self, head_dim: int, linear: bool, device: torch.device | str = "cpu"):
        self.head_dim = head_dim
        self.linear = linear
        features = 3 * head_dim + 1 if linear else 2 * head_dim
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.sum = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, o_s: Tensor, o_l: Tensor | None, o: Tensor) -> None:
        """Add rows; each [N, D], any float dtype; o_l is None where there is no linear branch."""
        if (o_l is not None) != self.linear:
            raise ValueError(f"o_l must {'' if self.linear else 'not '}be given")
        with full_precision():
            for part in range(0, len(o), 64 * ROWS):
                rows = slice(part, part + 64 * ROWS)
                columns = [o_s[rows].float()]
                if o_l is not None:
                    columns += [o_l[rows].float(), torch.ones(len(o[rows]), 1, device=o.device)]
                z = torch.cat([*columns, o[rows].float()], 1)
                z = torch.nn.functional.pad(z, (0, 0, 0, -len(z) % ROWS)).view(-1, ROWS, z.shape[1])
                self.sum += (z.mT @ z).to(self.sum.device, torch.float64).sum(0)
        self.rows += len(o)


@dataclass
class LayerFit:
    """What a layer's fit chose. Weights are None where nothing helped: A stays the identity, W and b stay zero.

    proj_s, proj_l: [D, D]; bias: [D]; float32. ridge_s, ridge_l: the strengths chosen.
    error_before, error_after: ||O - fit|| / ||O|| on held-out samples; error_fitted: of the fit where it was fitted.
    """

    proj_s: Tensor | None
    proj_l: Tensor | None
    bias: Tensor | None
    ridge_s: float | None
    ridge_l: float | None
    error_before: float
    error_after: float
    error_fitted: float


def fit_layer(fitted: Moments, held_out: Moments) -> LayerFit:
    """The fit to `fitted` of the ridges that do best on `held_out`."""
    D = fitted.head_dim
    inner = slice(0, fitted.sum.shape[0] - D)
    moments, check = (part.sum.cpu() / part.rows for part in (fitted, held_out))
    start = torch.zeros(inner.stop, D, dtype=torch.float64)
    start[:D] = torch.eye(D, dtype=torch.float64)
    best: tuple[float, Tensor, float | None, float | None] = (error_of(check, start), start, None, None)
    before = best[0]
    # From the fewest weights to the most, so that more of them have to earn their place.
    pairs = [(s, w) for s in RIDGES for w in (RIDGES if fitted.linear else (None,)) if (s, w) != (None, None)]
    for ridge_s, ridge_l in sorted(pairs, key=lambda pair: (pair[0] is not None) + (pair[1] is not None)):
        theta = solve(moments, start, D, ridge_s, ridge_l)
        error = error_of(check, theta)
        more = (ridge_s is not None) + (ridge_l is not None) > (best[2] is not None) + (best[3] is not None)
        if error < best[0] * (1 - WORTH if more else 1):
            best = (error, theta, ridge_s, ridge_l)
    after, theta, ridge_s, ridge_l = best

    def weight(rows, ridge):
        return None if ridge is None else theta[rows].T.float().contiguous()

    bias = None if ridge_l is None else theta[2 * D].float()
    return LayerFit(
        weight(slice(0, D), ridge_s), weight(slice(D, 2 * D), ridge_l), bias, ridge_s, ridge_l,
        before, after, error_of(moments, theta),
    )  # fmt: skip


def solve(moments: Tensor, start: Tensor, D: int, ridge_s: float | None, ridge_l: float | None) -> Tensor:
    """(X^T X + P) theta = X^T O + P start over the free rows of theta [features, D], P diagonal."""
    count = start.shape[0]
    strength = torch.zeros(count, dtype=torch.float64)
    free = torch.zeros(count, dtype=torch.bool)
    for rows, ridge in ((slice(0, D), ridge_s), (slice(D, 2 * D), ridge_l), (slice(2 * D, count), ridge_l)):
        if ridge is not None and rows.start < count:
            free[rows] = True
            strength[rows] = ridge * moments.diagonal()[rows].mean()
    gram = moments[:count, :count]
    residual = moments[:count, count:] - gram @ start  # the fit is a step from `start`
    theta = start.clone()
    theta[free] += torch.linalg.solve(gram[free][:, free] + strength[free].diag(), residual[free])
    return theta


def error_of(moments: Tensor, theta: Tensor) -> float:
    """||O - X theta|| / ||O||."""
    count = theta.shape[0]
    whole = torch.cat([theta, -torch.eye(theta.shape[1], dtype=theta.dtype)])
    total = moments.diagonal()[count:].sum().item()
    return math.sqrt(max(0.0, (whole * (moments @ whole)).sum().item()) / total) if total else 0.0


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever autocast and TF32 are set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
