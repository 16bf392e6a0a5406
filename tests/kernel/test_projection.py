import pytest
import torch

from diffusers_sla.kernel.plan import Now
from diffusers_sla.kernel.projection import project_sums


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("F", "D"), [(24, 24), (80, 40), (160, 160)])
@pytest.mark.parametrize("chunks", [1, 11])
def test_chunks_are_added_and_multiplied(transpose, F, D, chunks, device):
    torch.manual_seed(0)
    sums, z = torch.randn(2, 3, chunks, D, F, device=device), torch.rand(2, 3, chunks, F, device=device)
    weight = torch.randn(D, D, device=device)
    total, product = torch.empty(2, 3, F, D, device=device), torch.empty(2, 3, 1, F, D, device=device)
    z_total = torch.empty(2, 3, 1, F, device=device)
    project_sums(Now(sums.device), sums, z, weight, total, product, z_total, 3, transpose, 0.25)
    want = sums.double().sum(2).mT
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
    want = 0.25 * want @ (weight.T if transpose else weight).double()
    torch.testing.assert_close(product[:, :, 0].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z_total[:, :, 0], 0.25 * z.sum(2))
