import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # closeness, cases


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    """torch.empty hands out NaN (or a negative integer), so that what nobody wrote cannot pass for a result."""

    def filled(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            number = torch.iinfo(tensor.dtype).min // 2 if not tensor.is_floating_point() else float("nan")
            if tensor.dtype is torch.uint8:  # memory of other types: NaN of any float, -1 of any integer
                number = 255
            with torch.no_grad():  # activation checkpointing makes empty leaves of its own
                return tensor.fill_(number)

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device():
    """The GPU, or the CPU under Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
