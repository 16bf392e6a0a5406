import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_sla.kernel import launch


def compile_for(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead_of_time.py")
    ran = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.splitlines()


def test_the_kernels_compile_and_fit_where_there_is_least_shared_memory():
    assert compile_for("cuda", "86", "1") == ["compiled 8"]


def test_hoppers_own_kernels_compile():
    assert compile_for("cuda", "90", "1") == ["compiled 32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [("cuda", "80"), ("cuda", "86"), ("cuda", "90"), ("cuda", "100"), ("cuda", "120"), ("hip", "gfx942")]
)
def test_every_case_compiles_and_fits(target):
    more = 5 * 24 if target[1] == "90" else 0  # without proj_s, by the kernels in Gluon
    assert compile_for(*target) == [f"compiled {104 + more}"]


@pytest.mark.parametrize("shared", [launch.ROCM_SHARED, launch.SMALL_SHARED, *launch.SHARED.values()])
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (256, torch.float32)])
def test_tiles_divide_blocks(monkeypatch, shared, D, dtype):
    monkeypatch.setattr(launch, "shared_memory", lambda device: shared)
    q = torch.empty(1, 1, 1, D, dtype=dtype)
    for blkq in (16, 32, 64, 128):
        for blkk in (16, 32, 64, 128):
            for config in (launch.forward_config(q, blkq, blkk), launch.dq_config(q, blkq, blkk)):
                assert blkq % config.block_m == 0
                assert max(blkk, config.block_n) % min(blkk, config.block_n) == 0
            config = launch.dkdv_config(q, blkq, blkk)
            assert blkk % config.block_n == 0
            assert max(blkq, config.block_m) % min(blkq, config.block_m) == 0


def test_head_sizes_are_padded_to_powers_of_two():
    assert [launch.block_d(D) for D in (1, 16, 17, 40, 64, 72, 128, 160, 256)] == [16, 16, 32, 64, 64, 128, 128, 256, 256]  # fmt: skip  # noqa: E501
