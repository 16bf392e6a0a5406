"""Every address a kernel reads or writes must lie in one of its tensors: a memory checker for Triton's interpreter."""

import numpy as np
import torch
from triton.runtime import interpreter


def _range(x):
    """First address of a tensor, and the one after its last."""
    last = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def use(monkeypatch):
    """Check each load and store of every launch until the test ends."""
    ranges: list[tuple[int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def check(what, pointers, mask):
        addresses, there = np.broadcast_arrays(pointers.data.astype(np.int64), np.asarray(mask.data).astype(bool))
        addresses, size = addresses[there], pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in ranges:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{(~inside).sum()} addresses of a {what} lie in no tensor of the launch"

    def checked_launch(self, *arguments, **constants):
        ranges[:] = [_range(x) for x in arguments if isinstance(x, torch.Tensor)]
        return launch(self, *arguments, **constants)

    def checked_load(self, pointers, mask, *rest):
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", checked_launch)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
