"""A call's launches, worked out once for each layout of its tensors and repeated from then on.

The functions that launch take a `run` first: `Now`, where torch has work of its own in between, or a `Plan`, to which
they give the same launches over tensors that are not there yet. A plan knows every argument but the addresses, keeps
what no one needs after the call in one piece of memory, and calls the compiled kernels without Triton's binding of
arguments, which takes longer on the host than the kernels do at image sizes.
"""

import functools
import math
from operator import itemgetter
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .launch import table

ALIGN = 128
NUM_PLANS = 512


class Now:
    """Launches at once, on tensors."""

    def __init__(self, device):
        self.device = device

    def empty(self, shape, dtype=torch.float32, strides=None):
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x if strides is None else x.as_strided(shape, strides)

    def launch(self, kernel, grid, *arguments, **constants):
        kernel[grid](*arguments, **constants)


class Buffer:
    """A tensor that is not there yet: the bytes from `offset` on of tensor number `at` of a call."""

    def __init__(self, shape, dtype, device, strides=None, at=None, offset=0, shift=0):
        self.shape, self.dtype, self.device, self.at, self.offset = tuple(shape), dtype, device, at, offset
        self.shift = shift  # the address modulo 16
        self.strides = _contiguous(self.shape) if strides is None else strides
        self.size = math.prod(self.shape) * dtype.itemsize

    def stride(self):
        return self.strides

    def element_size(self):
        return self.dtype.itemsize

    def of(self, memory):
        """The tensor, in a tensor of bytes."""
        flat = memory[self.offset : self.offset + self.size].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)


class Parts:
    """Tensors that share one tensor of bytes: `add` gives the next one, `size` is how many bytes they take."""

    def __init__(self, device, at=None):
        self.device, self.at, self.size = device, at, 0

    def add(self, shape, dtype=torch.float32, strides=None):
        part = Buffer(shape, dtype, self.device, strides, self.at, self.size)
        self.size += _aligned(part.size)
        return part


def _contiguous(shape):
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _aligned(size):
    return (size + ALIGN - 1) // ALIGN * ALIGN


def aligned(x):
    """Whether rows of a tensor [B, H, L, D] begin at multiples of 16 bytes, as Triton can tell: by strides of 16."""
    shift = x.shift if isinstance(x, Buffer) else x.data_ptr() % 16
    return shift == 0 and all(stride % 16 == 0 for stride in x.stride()[:3])


def layout(x):
    """All that a plan needs to know of a tensor. Triton compiles for addresses that are multiples of 16, or not."""
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16)


def like(given):
    """The layout of torch.empty_like."""
    if given is None:
        return None
    dtype, shape, strides, _ = given
    return (dtype, shape, torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride(), 0)


class Plan:
    """The launches of a call on tensors of these layouts, `given`, and on one of bytes after them, `shared`."""

    def __init__(self, device, layouts):
        self.device = device
        self.given = [
            None if x is None else Buffer(x[1], x[0], device, x[2], at, 0, x[3]) for at, x in enumerate(layouts)
        ]
        self.shared = Parts(device, len(layouts))
        self.scratch: list = []
        # A given tensor with room for scratch until a launch takes it: one that only the last writes.
        self.spare: Any = None
        self.launches: list = []
        self.ready = None

    def empty(self, shape, dtype=torch.float32, strides=None):
        self.scratch.append(Buffer(shape, dtype, self.device, strides))
        return self.scratch[-1]

    def launch(self, kernel, grid, *arguments, **constants):
        self.launches.append((kernel, grid, arguments, constants))

    def done(self):
        """Place what is scratch: what no launch needs at the same time may share bytes."""
        self.bytes = 0
        taken = [] if self.spare is None else self._uses(self.spare)
        placed: dict = {True: [], False: []}
        for buffer in self.scratch:
            used = self._uses(buffer)
            free = bool(taken) and used[-1] < taken[0]
            in_spare = free and self._place(buffer, used, placed[True]) <= self.spare.size
            if not in_spare:
                self.bytes = max(self.bytes, self._place(buffer, used, placed[False]))
            buffer.at = self.spare.at if in_spare else len(self.given) + 1
            placed[in_spare].append((used[0], used[-1], buffer))
        return self

    def _uses(self, buffer):
        return [i for i, launch in enumerate(self.launches) if any(x is buffer for x in launch[2])]

    @staticmethod
    def _place(buffer, used, placed):
        """The first offset that is free from the first to the last launch that uses the buffer; returns its end."""
        buffer.offset = 0
        for first, last, other in sorted(placed, key=lambda entry: entry[2].offset):
            if first > used[-1] or last < used[0]:
                continue
            if buffer.offset + buffer.size <= other.offset:
                break
            buffer.offset = max(buffer.offset, other.offset + _aligned(other.size))
        return buffer.offset + buffer.size

    def run(self, *tensors):
        scratch = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        if self.ready is None:
            self.ready = self._first((*tensors, scratch))
            return
        places, constants, launches = self.ready
        bases = [0 if x is None else x.data_ptr() for x in (*tensors, scratch)]
        values = [bases[at] + offset for at, offset in places] + constants
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        if hooked():
            for compiled, grid, arguments_of in launches:
                compiled[grid](*arguments_of(values), stream=stream)
            return
        # The same without what there is only for hooks.
        for compiled, grid, arguments_of in launches:
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*grid, stream, function, metadata, None, None, None, *arguments_of(values))

    def _first(self, tensors):
        """Launch through Triton, which compiles. Returns what the next run needs, None under the interpreter."""
        buffers = {id(x): x for _, _, arguments, _ in self.launches for x in arguments if isinstance(x, Buffer)}
        numbers = {key: number for number, key in enumerate(buffers)}
        constants: list = []
        launches: list = []
        for kernel, grid, arguments, given in self.launches:
            compiled = kernel[grid](*(self._tensor(x, tensors) for x in arguments), **given)
            if compiled is None:
                continue
            where = []
            names = kernel.arg_names
            if len(compiled.src.signature) < len(names):  # Triton 3.2 leaves the constexprs out
                names = names[: len(arguments)]
            for x in (*arguments, *(given[name] for name in names[len(arguments) :])):
                if isinstance(x, Buffer):
                    where.append(numbers[id(x)])
                else:
                    where.append(len(buffers) + len(constants))
                    constants.append(x)
            launches.append((compiled, (*grid, 1, 1)[:3], itemgetter(*where)))
        return ([(x.at, x.offset) for x in buffers.values()], constants, launches) if launches else None

    def _tensor(self, x, tensors):
        if not isinstance(x, Buffer):
            return x
        tensor = tensors[x.at]
        if x.at >= len(self.given):
            return x.of(tensor)
        if x is self.given[x.at]:
            return tensor
        return x.of(tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))


def hooked():
    """Whether Triton is to call someone, such as its profiler, with every launch."""
    hooks: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel
    # Since Triton 3.5 a hook is a chain of calls.
    return any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook))


def planned(make):
    """Keep the plans of make(device, *hashable), as long as the table of tiles is what it was."""

    @functools.lru_cache(maxsize=NUM_PLANS)
    def kept(device, *key):
        tiles = dict(table(device))
        return make(device, *key).done(), tiles

    @functools.wraps(make)
    def plan(device, *key):
        found, tiles = kept(device, *key)
        if tiles != table(device):
            kept.cache_clear()
            found, _ = kept(device, *key)
        return found

    return plan
