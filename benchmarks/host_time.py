"""What Python does for a call of the Triton path before a driver does anything. Needs Triton, but no GPU.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --profile

Microseconds of a call, median and least of many, on one core: the kernels are compiled for sm_90 and the stand-in for
the driver drops their launches. The tensors are on the CPU, so that PyTorch's own part is a CPU's.
"""

import cProfile
import itertools
import pstats
import statistics
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class IdleDriver:
    """Compiles for sm_90 and launches nothing. `launched`, if a list, gets a launch's name, compiled function, grid,
    stream and arguments."""

    launched: list | None = None
    stream = 0
    loaded = itertools.count(1)

    def __init__(self):
        idle = self

        class Launcher:
            def __init__(self, source, metadata):
                self.name = metadata.name

            def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
                if enter is not None:
                    enter(launch_metadata)
                if idle.launched is not None:
                    idle.launched.append((self.name, function, (x, y, z), stream, arguments))
                if leave is not None:
                    leave(launch_metadata)

        self.launcher_cls, self.utils = Launcher, self

    def load_binary(self, name, kernel, shared, device):
        most_threads = (1024,) if hasattr(triton, "knobs") else ()  # since Triton 3.4
        return 1, next(self.loaded), 32, 0, *most_threads  # module, function, registers, spills

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def unload_module(self, *_):
        pass

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def is_active(self):
        return True


def use_idle_driver():
    from diffusers_sla.kernel import sparse

    idle = IdleDriver()
    driver.set_active(idle)
    sparse.INTERPRETED = True  # else it refuses tensors on a CPU
    return idle


def calls(D):
    """Forward, forward that saves, and backward, as functions."""
    from diffusers_sla.kernel import sla_attention

    shape = (1, 256, 2, D)
    q, k, v = (torch.empty(shape, dtype=torch.float16).transpose(1, 2).requires_grad_() for _ in range(3))
    w, b = torch.zeros(D, D, requires_grad=True), torch.zeros(D, requires_grad=True)

    def forward():
        return sla_attention(
            q, k, v, topk=0.2, blkq=128, blkk=64, proj_l_weight=w, proj_l_bias=b, impl="triton"
        )  # fmt: skip

    def inference():
        with torch.no_grad():
            return forward()

    o = forward()
    do = torch.zeros_like(o)
    return {
        "forward": inference,
        "forward, with grad": forward,
        "backward": lambda: torch.autograd.grad(o, (q, k, v, w, b), do, retain_graph=True),
    }


def microseconds(call, repeats=2000):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[repeats // 10 :]), min(times)


def main(profile):
    use_idle_driver()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Triton {triton.__version__}")
    for name, call in calls(128).items():
        call()
        median, least = microseconds(call)
        print(f"{name}: {median:.0f} us, at least {least:.0f}")
        if profile:
            profiler = cProfile.Profile()
            profiler.runcall(microseconds, call)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main("--profile" in sys.argv[1:])
