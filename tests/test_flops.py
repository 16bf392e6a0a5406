import pytest

from diffusers_sla import SLAConfig
from diffusers_sla.flops import dense_flops, sla_flops


def test_dense_is_two_matrix_products():
    assert dense_flops(2, 3, 100, 50, 8) == 2 * 3 * (2 * 100 * 50 * 8) * 2


def test_sla_by_hand():
    # 10 x 10 blocks of 16, two kept: scores, sparse, phi(K)^T V and row sums, phi(Q) times both
    config = SLAConfig(topk=0.2, blkq=16, blkk=16)
    scores, sparse, linear = 2 * 10 * 10 * 8, 4 * 160 * 32 * 8, 2 * (160 + 160) * 8 * 9
    assert sla_flops(config, 1, 1, 160, 160, 8) == scores + sparse + linear
    assert sla_flops(config, 2, 3, 160, 160, 8, proj_s=True) == 6 * (scores + sparse + linear + 2 * 160 * 8 * 8)
    marginal = SLAConfig(topk=0.2, blkq=16, blkk=16, linear="marginal")
    assert sla_flops(marginal, 1, 1, 160, 160, 8) == scores + sparse + linear + 2 * 100 * 8 * 9
    hedgehog = SLAConfig(topk=0.2, blkq=16, blkk=16, feature_map="hedgehog")
    assert sla_flops(hedgehog, 1, 1, 160, 160, 8) == scores + sparse + 2 * linear + 2 * 320 * 8 * 8


def test_text_stays_dense():
    config = SLAConfig(topk=0.2, blkq=16, blkk=16, linear="none")
    scores = 2 * 10 * 10 * 8
    text = 4 * 7 * 167 * 8
    image = 4 * 160 * (7 + 32) * 8
    assert sla_flops(config, 1, 1, 167, 167, 8, 7, 7) == scores + text + image
    assert sla_flops(config, 1, 1, 160, 167, 8, 0, 7) == scores + image


@pytest.mark.parametrize("L", [1, 100, 160])
def test_every_block_kept_is_dense_plus_the_choice(L):
    config = SLAConfig(topk=1.0, blkq=16, blkk=16, linear="none")
    blocks = -(-L // 16)
    assert sla_flops(config, 1, 2, L, L, 8) == dense_flops(1, 2, L, L, 8) + 2 * 2 * blocks * blocks * 8
