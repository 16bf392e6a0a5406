"""Thousands of damaged and hostile state files: each loads as what it was, or is refused, and nothing else happens.

    python tests/mutants.py --count 10000 --seed 0

prints how many of each kind were tried, refused and loaded, the slowest one, and how much memory was taken at most.
It exits with 1 at the first file that runs code, changes a model by half, loads as something else, raises anything
but SLAError, or takes more than the limit.
"""

import argparse
import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from models import make
from safetensors.torch import save as save_safetensors

from diffusers_sla import SLAConfig, SLAError, apply_sla, load_sla_weights, sla_parameters
from diffusers_sla.state import write_state
from diffusers_sla.tensor_files import code_in_pickles
from diffusers_sla.weights import sla_state

MEMORY_LIMIT = 512 << 20
SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)
SENTINEL = "ran"


def saved(payload) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


class Mutants:
    """Makes mutants of the files of one trained model; every method called `make_*` is a kind."""

    def __init__(self, seed: int, folder: Path):
        self.random = random.Random(seed)
        self.folder = folder
        self.model, _ = make("wan")
        apply_sla(self.model, SPARSE)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in sla_parameters(self.model):
                parameter.normal_(std=0.3)
        state = sla_state(self.model)
        self.files = {}
        for suffix in (".pt", ".safetensors"):
            write_state(state, folder / f"base{suffix}")
            self.files[suffix] = (folder / f"base{suffix}").read_bytes()
        self.payload = torch.load(folder / "base.pt", weights_only=True)
        self.trained = [parameter.detach().clone() for parameter in sla_parameters(self.model)]
        self.kinds = sorted(name for name in dir(self) if name.startswith("make_"))

    def make(self, number: int) -> tuple[str, str, bytes]:
        """(kind, suffix, contents) of a mutant."""
        kind = self.kinds[number % len(self.kinds)]
        suffix, contents = getattr(self, kind)()
        return kind.removeprefix("make_"), suffix, contents

    def some_file(self) -> tuple[str, bytearray]:
        suffix = self.random.choice(list(self.files))
        return suffix, bytearray(self.files[suffix])

    def make_bits_flipped(self):
        suffix, data = self.some_file()
        for _ in range(self.random.choice([1, 1, 1, 2, 8, 64])):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return suffix, bytes(data)

    def make_cut_short(self):
        suffix, data = self.some_file()
        return suffix, bytes(data[: self.random.randrange(len(data))])

    def make_parts_moved(self):
        suffix, data = self.some_file()
        start, size, to = (
            self.random.randrange(len(data)),
            self.random.randrange(1, 200),
            self.random.randrange(len(data)),
        )
        part = data[start : start + size]
        if self.random.random() < 0.5:
            data[to : to + len(part)] = part
        else:
            data[to:to] = part
        return suffix, bytes(data)

    def make_parts_replaced(self):
        suffix, data = self.some_file()
        start, size = self.random.randrange(len(data)), self.random.randrange(1, 100)
        filler = self.random.choice([b"\0" * size, b"\xff" * size, self.random.randbytes(size), b"9" * size])
        data[start : start + size] = filler
        return suffix, bytes(data)

    def make_tensors_swapped(self):
        """The digest is of the file before the swap."""
        state = {layer: dict(named) for layer, named in self.payload["state"].items()}
        (a, b), name = self.random.sample(list(state), 2), self.random.choice(["proj_l.weight", "proj_l.bias"])
        state[a][name], state[b][name] = state[b][name], state[a][name]
        if self.random.random() < 0.3:
            state[a]["proj_l.weight"] = state[a]["proj_l.weight"].t()
        return self._written(self.payload | {"state": state})

    def make_settings_changed(self):
        settings = dict(self.payload["settings"])
        settings[self.random.choice(list(settings))] = self._any(2)
        return self._written(self.payload | {"settings": settings})

    def make_contents_replaced(self):
        payload = dict(self.payload)
        for _ in range(self.random.randrange(1, 4)):
            name = self.random.choice(["format", "version", "settings", "state", "meta", "digest", "extra"])
            if self.random.random() < 0.4:
                payload.pop(name, None)
            else:
                payload[name] = self._any(3)
        return ".pt", saved(payload)

    def make_tensors_replaced(self):
        state = {layer: dict(named) for layer, named in self.payload["state"].items()}
        layer = self.random.choice(list(state))
        state[layer][self.random.choice(["proj_l.weight", "proj_l.bias", "proj_x", "", "../../x"])] = (
            self._any_tensor()
        )
        payload = self.payload | {"state": state}
        payload.pop("digest", None)
        return ".pt", saved(payload)

    def make_absurd_shapes(self):
        """A few bytes that claim to be any number of numbers."""
        n = self.random.choice([257, 10**4, 10**6, 10**9])
        one = torch.zeros(1)
        tensor = self.random.choice([one.expand(n, n), one.expand(n), one.expand(256, 256).expand(7, 256, 256)])
        layers = {
            f"transformer.blocks.{i}.attn1": {"proj_l.weight": tensor} for i in range(self.random.choice([1, 2, 50]))
        }
        if self.random.random() < 0.3:
            layers = {f"l{i}": {"proj_l.weight": one.expand(256, 256)} for i in range(5000)}
        payload = self.payload | {"state": layers}
        if self.random.random() < 0.5:
            return ".pt", saved(payload)
        size = self.random.choice([1 << 20, 1 << 40, (1 << 63) - 1])
        header = {"a.proj_l.weight": {"dtype": "F32", "shape": [size, size], "data_offsets": [0, size]}}
        return ".safetensors", self._safetensors(json.dumps(header).encode(), b"\0" * 8)

    def make_hostile_pickles(self):
        data = pickle_of(self.random, str(self.folder / SENTINEL))
        if self.random.random() < 0.5:
            return ".pt", data
        return ".pt", self._archive({"data.pkl": data, "version": b"3\n", "byteorder": b"little"})

    def make_hostile_objects(self):
        target = str(self.folder / SENTINEL)
        module, name = self.random.choice(
            [
                ("os", "mkdir"),
                ("builtins", "open"),
                ("pathlib", "Path.mkdir"),
                ("subprocess", "call"),
                ("os", "system"),
            ]
        )
        arguments = {"call": (["mkdir", target],), "system": (f"mkdir {target}",)}.get(name, (target,))
        evil = Calls(
            module,
            name,
            arguments,
        )
        return ".pt", saved(self.random.choice([evil, {"state": evil}, self.payload | {"meta": {"a": [evil]}}]))

    def make_memory_eaters(self):
        """What weights_only allows by itself and would allocate without bound."""
        calls = [
            ("builtins", "bytearray", (1 << 36,)), ("torch", "Tensor", (1 << 17, 1 << 18)),
            ("builtins", "set", ([],)), ("collections", "Counter", ("a" * 1000,)),
        ]  # fmt: skip
        data = pickle.dumps(Calls(*self.random.choice(calls)), protocol=2)
        return ".pt", self._archive({"data.pkl": data, "version": b"3\n"})

    def make_zip_bombs(self):
        kind = self.random.randrange(4)
        if kind == 0:  # 64 MiB of zeros in 64 KiB
            bomb = {"data.pkl": saved_pickle(self.payload), "data/0": b"\0" * (64 << 20), "version": b"3\n"}
            return ".pt", self._archive(bomb, zipfile.ZIP_DEFLATED)
        if kind == 1:
            return ".pt", self._archive({"data.pkl": b"\x80\x02" + b"N0" * (8 << 20) + b"N."}, zipfile.ZIP_DEFLATED)
        data = bytearray(self.files[".pt"])
        at = self.random.choice(positions(data, b"PK\1\2"))
        if kind == 2:  # sizes in the directory: compressed, uncompressed, or both
            lie = struct.pack("<I", self.random.choice([0, 1, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF]))
            for field in self.random.choice([(20,), (24,), (20, 24)]):
                data[at + field : at + field + 4] = lie
            return ".pt", bytes(data)
        names = {
            f"{self.random.choice(['../', '/', 'a/' * 50])}{i}": b"x" for i in range(self.random.choice([3, 2000]))
        }
        return ".pt", self._archive({"data.pkl": saved_pickle(self.payload), "version": b"3\n", **names})

    def make_headers_damaged(self):
        data = self.files[".safetensors"]
        size = struct.unpack("<Q", data[:8])[0]
        header, tensors = data[8 : 8 + size], data[8 + size :]
        choice = self.random.randrange(5)
        if choice == 0:
            header = b"[" * 100_000
        elif choice == 1:
            words = header.decode().split('"')
            words[self.random.randrange(len(words))] = self.random.choice(
                ["", "F64", "-1", "1e999", "\\u0000", "BF16"]
            )
            header = '"'.join(words).encode()
        elif choice == 2:
            described = json.loads(header)
            named = self.random.choice([name for name in described if name != "__metadata__"])
            described[named][self.random.choice(["shape", "data_offsets", "dtype"])] = self._any(2)
            header = json.dumps(described, default=str).encode()
        elif choice == 3:
            described = json.loads(header)
            text = json.loads(described["__metadata__"]["diffusers_sla"])
            text[self.random.choice(list(text))] = self._any(2)
            described["__metadata__"]["diffusers_sla"] = json.dumps(text, default=str)
            header = json.dumps(described).encode()
        else:
            lie = self.random.choice([0, 1, size - 1, size + 1, 1 << 24, 1 << 31, 1 << 63, (1 << 64) - 1])
            return ".safetensors", struct.pack("<Q", lie) + header + tensors
        return ".safetensors", self._safetensors(header, tensors)

    def make_nested_deep(self):
        value = "x"
        if self.random.random() < 0.5:
            for _ in range(self.random.choice([17, 150])):
                value = [value]
        else:
            for _ in range(60):
                value = [value, value]
        data = saved(self.payload | {self.random.choice(["meta", "settings", "state", "version"]): {"a": value}})
        return ".pt", data

    def make_other_projects_damaged(self):
        key = "blocks.{}.self_attn.attn_op.local_attn.proj_l"
        payload = {f"{key.format(i)}.{end}": self._any_tensor() for i in range(2) for end in ("weight", "bias")}
        if self.random.random() < 0.5:
            tensors = {"proj_l.weight": self._any_tensor(), "proj_l.bias": self._any_tensor()}
            name = self.random.choice(["12:bf16", "12", "-1:bf16", "²:fp32", "99999999999:bf16", ":"])
            payload = {"settings": {"topk": 0.2}, "version": 1, "state": {name: tensors}}
        return ".pt", saved(payload)

    def _written(self, payload):
        if self.random.random() < 0.5:
            return ".pt", saved(payload)
        tensors = {
            f"{layer}.{name}": tensor.contiguous().clone()
            for layer, named in payload["state"].items()
            for name, tensor in named.items()
        }
        header = {name: value for name, value in payload.items() if name != "state"}
        return ".safetensors", save_safetensors(tensors, metadata={"diffusers_sla": json.dumps(header, default=str)})

    def _archive(self, members, compression=zipfile.ZIP_STORED) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, contents in members.items():
                archive.writestr(name if name.startswith(("/", "..")) else f"archive/{name}", contents)
        return file.getvalue()

    def _safetensors(self, header: bytes, tensors: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + tensors

    def _any(self, depth: int):
        leaves = [None, True, -1, 0, 3, 1 << 80, 0.5, float("nan"), "", "x" * 1000, "diffusers_sla", b"bytes", 1j, ()]
        if depth == 0 or self.random.random() < 0.5:
            return self.random.choice([*leaves, self._any_tensor()])
        if self.random.random() < 0.5:
            return [self._any(depth - 1) for _ in range(self.random.randrange(3))]
        keys = ["transformer.blocks.0.attn1", "proj_l.weight", "topk", "", 7, None]
        return {self.random.choice(keys): self._any(depth - 1) for _ in range(self.random.randrange(3))}

    def _any_tensor(self):
        shape = self.random.choice([(), (0,), (12,), (13,), (12, 12), (12, 13), (300, 300), (3, 3, 3), (1, 1)])
        dtype = self.random.choice(
            [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool]
        )
        tensor = torch.zeros(shape, dtype=dtype)
        if tensor.is_floating_point() and tensor.numel() and self.random.random() < 0.3:
            tensor.view(-1)[0] = self.random.choice([float("nan"), float("inf"), 3e38])
        return tensor


class Calls:
    """Pickles as a call of module.name(*arguments)."""

    def __init__(self, module, name, arguments):
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self):
        import importlib

        function = importlib.import_module(self.module)
        for part in self.name.split("."):
            function = getattr(function, part)
        return function, self.arguments


def saved_pickle(payload) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved(payload))) as archive:
        return archive.read("archive/data.pkl")


def pickle_of(rng: random.Random, target: str) -> bytes:
    """A pickle that makes the folder `target` when it is run, by one of the ways to name a function."""
    text = target.encode()
    argument = b"X" + struct.pack("<I", len(text)) + text
    call = argument + b"\x85R."
    return b"\x80\x04" + rng.choice(
        [
            b"cos\nmkdir\n" + call,
            b"\x8c\x02os\x8c\x05mkdir\x93" + call,
            b"\x8c\x02os\x94\x8c\x05mkdir\x94\x93" + call,
            b"\x8c\x02os\x94\x8c\x05mkdir\x94h\0h\1\x93" + call,
            b"\x8c\x0bcollections\x8c\x0bOrderedDict00\x8c\x02os\x8c\x05mkdir\x93" + call,
            b"\x8c\x02os\x8c\x05mkdirN0\x93" + call,
            b"(" + argument + b"ios\nmkdir\n.",
            b"cbuiltins\ngetattr\n(cos\npath\n\x8c\x02osRN." + call,
            b"cbuiltins\neval\nX"
            + struct.pack("<I", len(text) + 29)
            + b"__import__('os').mkdir('"
            + text
            + b"')  \x85R.",
            b"ctorch.hub\nload\n" + call,
            b"\x82\x01" + call,
            b"cos\nmkdir\n" * 50 + call,
        ]
    )


def positions(data: bytes, what: bytes) -> list[int]:
    found, at = [], data.find(what)
    while at >= 0:
        found.append(at)
        at = data.find(what, at + 1)
    return found


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def million_keys(folder: Path):
    """Two files with a million entries, written piece by piece."""
    names = [f"transformer.blocks.{i}.attn1.proj_l.bias" for i in range(3)]
    with (
        zipfile.ZipFile(folder / "million.pt", "w") as archive,
        archive.open("a/data.pkl", "w", force_zip64=True) as file,
    ):
        file.write(b"\x80\x02}(")
        for number in range(1_000_000):
            name = f"{names[number % 3]}{number}".encode()
            file.write(b"X" + struct.pack("<I", len(name)) + name + b"N")
        file.write(b"u.")
    entry = ',"{}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}'
    size = sum(len(entry.format(f"k{i}", 4 * i, 4 * i + 4)) for i in range(1_000_000)) + 1
    with (folder / "million.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{" + entry.format("k0", 0, 4).encode()[1:])
        for i in range(1, 1_000_000):
            file.write(entry.format(f"k{i}", 4 * i, 4 * i + 4).encode())
        file.write(b"}")
        file.truncate(8 + size + 4_000_000)
    return folder / "million.pt", folder / "million.safetensors"


def limit_memory() -> None:
    """A file that slips through everything shall not take the machine with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MEMORY_LIMIT, -1))


def run(count: int, seed: int) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    mutants = Mutants(seed, folder)
    parameters = sla_parameters(mutants.model)
    files = sorted(path.name for path in folder.iterdir())
    tried, loaded = Counter(), Counter()
    slowest = (0.0, "")
    if sys.platform == "linux":
        limit_memory()
    before = memory()
    for number in range(count):
        kind, suffix, contents = mutants.make(number)
        path = folder / f"mutant{suffix}"
        path.write_bytes(contents)
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        start = time.perf_counter()
        try:
            load_sla_weights(mutants.model, path)
            same = all(torch.equal(a, b) for a, b in zip(sla_parameters(mutants.model), mutants.trained, strict=True))
            if not same and b"digest" in contents:
                fail(path, kind, number, "loaded as something else")
            loaded[kind] += 1
            apply_sla(mutants.model, SPARSE)
            parameters = sla_parameters(mutants.model)
        except SLAError:
            if any(parameter.any() for parameter in sla_parameters(mutants.model)):
                fail(path, kind, number, "refused, and yet the model changed")
        except BaseException as error:
            fail(path, kind, number, f"raised {type(error).__name__}: {error}")
        if "hostile" in kind and suffix == ".pt" and not code_in_pickles(path):
            fail(path, kind, number, "the code in it was not seen")
        slowest = max(slowest, (time.perf_counter() - start, kind))
        tried[kind] += 1
        path.unlink()
        if sorted(found.name for found in folder.iterdir()) != files:
            fail(path, kind, number, "it made files")
        if memory() - before > MEMORY_LIMIT:
            fail(path, kind, number, f"took {(memory() - before) >> 20} MiB")
    if count >= 10_000:
        for path in million_keys(folder):
            start = time.perf_counter()
            try:
                load_sla_weights(mutants.model, path)
                fail(path, "million_keys", count, "was loaded")
            except SLAError:
                slowest = max(slowest, (time.perf_counter() - start, "million_keys"))
            tried["million_keys"] += 1
            path.unlink()
        if memory() - before > MEMORY_LIMIT:
            fail(path, "million_keys", count, f"took {(memory() - before) >> 20} MiB")
        count += 2
    return {
        "tried": count, "loaded": sum(loaded.values()), "refused": count - sum(loaded.values()),
        "slowest_s": round(slowest[0], 3), "slowest_kind": slowest[1], "memory_mib": (memory() - before) >> 20,
        "kinds": {kind: {"tried": tried[kind], "loaded": loaded[kind]} for kind in sorted(tried)},
    }  # fmt: skip


def fail(path: Path, kind: str, number: int, what: str) -> None:
    sys.exit(f"mutant {number} ({kind}): {what}; kept as {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.count, arguments.seed), indent=2))
