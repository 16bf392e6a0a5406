"""Random configurations of the whole op against its definition: a few under the interpreter, 300 on a GPU."""

import random

import bounds
import pytest
import torch
from cases import Case, check


def any_case(seed, on_gpu):
    """A configuration drawn at random. The interpreter multiplies bfloat16 wrongly, and takes its time."""
    draw = random.Random(seed)
    D = draw.choice([16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256] if on_gpu else [16, 24, 40])
    longest = draw.choice([70, 200, 600] if on_gpu else [70, 130])
    Hkv = draw.choice([1, 2, 3])
    Lq = draw.randint(8, longest)
    Lk = draw.choice([Lq, draw.randint(8, longest)])
    topk = draw.choice([0.05, 0.2, 0.5, 1.0])
    return Case(
        B=draw.choice([1, 2]), H=Hkv * draw.choice([1, 1, 2]), Hkv=Hkv, Lq=Lq, Lk=Lk, D=D,
        dtype=draw.choice([torch.float32, torch.float16] + [torch.bfloat16] * 2 * on_gpu),
        topk=topk, skip=draw.choice([0.0, 0.0, 0.3]) if topk < 0.7 else 0.0,
        blkq=draw.choice([16, 32, 64, 128]), blkk=draw.choice([16, 32, 64, 128]),
        feature_map=draw.choice(["softmax", "softmax", "elu", "relu", "hedgehog"]), tied=draw.random() < 0.5,
        linear=draw.choice(["all", "marginal", "none"]), scale=draw.choice([None, None, 0.3, -0.2]),
        mask=draw.random() < 0.3, keep_q=(draw.choice([0, Lq // 4]), draw.choice([0, Lq // 3])),
        keep_k=(draw.choice([0, Lk // 4]), draw.choice([0, Lk // 3])), proj_s=draw.random() < 0.3,
        blhd=draw.random() < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_random_configurations(seed, device, monkeypatch):
    if device == "cpu":  # on a GPU compute-sanitizer does that: make sanitize-gpu
        bounds.use(monkeypatch)
    check(any_case(seed, on_gpu=False), "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_random_configurations_on_a_gpu(seed):
    check(any_case(seed, on_gpu=True), "triton", "cuda")
