import pytest
import torch

from diffusers_sla.kernel.linear import linear_bwd_k
from diffusers_sla.kernel.plan import Now


@pytest.mark.parametrize(("D", "dtype"), [(24, torch.float32), (40, torch.float16)])
def test_gradients_of_the_weights_are_sums_over_all_heads_and_shares(D, dtype, device):
    torch.manual_seed(0)
    dm, h = (torch.randn(2, 3, D, D, device=device) for _ in range(2))
    shares = torch.randn(129, D, device=device)
    dweight, dbias = torch.empty(D, D, device=device, dtype=dtype), torch.empty(D, device=device, dtype=dtype)
    x = torch.zeros(2, 3, 16, D, device=device, dtype=dtype)
    linear_bwd_k(
        Now(dm.device), x, x, None, h[:, :, None].to(dtype), shares.new_zeros(2, 3, 1, D), torch.empty_like(x),
        torch.empty_like(x), 16, (0, 0), "softmax", (dm, h, shares, dweight, dbias),
    )  # fmt: skip
    tolerance = {"rtol": 0, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-11, "atol": 1e-4}
    expected = torch.einsum("bhfe,bhfd->ed", dm.double(), h.double())
    torch.testing.assert_close(dweight.double(), expected, **tolerance)
    torch.testing.assert_close(dbias.double(), shares.double().sum(0), **tolerance)
