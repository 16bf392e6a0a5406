import pytest
import torch

from diffusers_sla.kernel.plan import Now
from diffusers_sla.kernel.prepare import prepare


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def prepared(q, k, v, blk, linear="all", key_mask=None, fk=None, feature_map="softmax"):
    run = Now(q.device)
    return prepare(run, q, k, v, fk, key_mask, blk, blk, (0, 0), (0, 0), feature_map, linear, True, 0.5)


def means(x, blk):
    return torch.stack([block.double().mean(2) for block in x.split(blk, 2)], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("L", "blk"), [(150, 16), (150, 64), (257, 128)])
def test_blocks_of_q_and_k_are_averaged(dtype, L, blk, device):
    q, k, v = (torch.randn(2, 3, L, 24, device=device).to(dtype) for _ in range(3))
    q_mean, k_mean, k_bias, _, _ = prepared(q, k, v, blk)
    assert k_bias is None
    for got, x in ((q_mean, q), (k_mean, k)):
        torch.testing.assert_close(got.double(), means(x, blk), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_stays_in_its_block(dtype, device):
    q, k, v = (torch.randn(1, 1, 160, 16, device=device).to(dtype) for _ in range(3))
    q[0, 0, 40, 3] = k[0, 0, 70, 5] = float("nan")
    q_mean, k_mean, *_ = prepared(q, k, v, 32, "none")
    for mean, block, column in ((q_mean, 1, 3), (k_mean, 2, 5)):
        bad = torch.zeros(5, 16, dtype=torch.bool, device=device)
        bad[block, column] = True
        assert torch.equal(mean[0, 0].isnan(), bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
def test_sums_are_values_by_features(dtype, feature_map, device):
    q, k, v, fk = (torch.randn(2, 2, 100, 24, device=device).to(dtype) for _ in range(4))
    key_mask = torch.rand(2, 100, device=device) > 0.3
    key_mask[:, ::32] = True  # no block without a key
    _, k_mean, k_bias, sums, z = prepared(q, k, v, 32, key_mask=key_mask, fk=fk, feature_map=feature_map)
    x = fk if feature_map == "hedgehog" else k
    f = (torch.cat([x, -x], -1) if feature_map == "hedgehog" else x).double().softmax(-1)
    f = f * key_mask[:, None, :, None]
    want = 0.5 * v.double().mT @ f
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(sums.double().sum(2), want, **tolerance)
    torch.testing.assert_close(z.double().sum(2), 0.5 * f.sum(2), rtol=1e-4, atol=1e-4)
    assert torch.equal(k_bias, torch.zeros_like(k_bias))
    visible = key_mask[:, None, :32, None]
    first = (k[:, :, :32] * visible).double().sum(2) / visible.sum(2)
    torch.testing.assert_close(k_mean[:, :, 0].double(), first, rtol=1e-4, atol=1e-5)
