"""Reading .pt and .safetensors files that nobody vouches for.

No code in a file is ever run: `torch.load(weights_only=True)` sees to that. This module sees to the rest: what a file
claims is held against its size and against limits before anything is allocated, and what it imports is read off its
opcodes, without unpickling.
"""

import io
import json
import os
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import SLAError, SLAStateFormatError

# A state of a thousand layers has a pickle of 0.3 MB and a header of as much; a 14B checkpoint has less.
MAX_INDEX_BYTES = 16 << 20
MAX_PLAIN_VALUES = 100_000
MAX_PLAIN_DEPTH = 16
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_TENSOR_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch\.storage \w+Storage"
)
# What else the pickles of optimizers, schedulers and random states import; the Hub's own scan calls these innocuous.
_PLAIN_GLOBALS = re.compile(
    r"torch\._utils _rebuild_\w+|torch (Size|device|dtype|float\w+|bfloat16|int\w+|uint8|bool)"
    r"|torch\.serialization _get_layout|numpy(\._?core\.multiarray)? (_reconstruct|scalar|dtype|ndarray)"
    r"|numpy\.dtypes \w+DType|_codecs encode|(__builtin__|builtins) (set|frozenset|bytearray|complex|slice|range)"
    r"|collections (defaultdict|Counter|deque)|datetime \w+"
)


def load_pt(path: str | os.PathLike) -> Any:
    """What torch.save put into a .pt file: plain values, and tensors that stay on disk until they are read.

    Raises:
        SLAStateFormatError: Damaged, compressed, larger inside than outside, or with more than plain tensors in it.
    """
    path = Path(path)
    with _damaged(path):
        _check_no_pointer(path)
        _check_archive(path)
        for name in sorted(pickle_globals(path)):
            if not _TENSOR_GLOBALS.fullmatch(name):
                raise SLAStateFormatError(
                    f"{path} holds more than plain tensors: its pickle imports {name.replace(' ', '.')}"
                )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[tuple[dict[str, str], Mapping[str, torch.Tensor]]]:
    """(header's metadata, tensors by name, each read when it is asked for).

    Raises:
        SLAStateFormatError: Damaged, or with a header beyond MAX_INDEX_BYTES.
    """
    path = Path(path)
    with _damaged(path):
        _check_no_pointer(path)
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
        if size > min(MAX_INDEX_BYTES, path.stat().st_size - 8):
            raise SLAStateFormatError(f"{path} is damaged: its header claims {size} bytes")
        with safe_open(path, framework="pt") as opened:
            yield opened.metadata() or {}, _LazyTensors(opened)


class _LazyTensors(Mapping):
    def __init__(self, opened: Any):
        self._opened = opened
        self._names = dict.fromkeys(opened.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._opened.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def pickle_globals(path: str | os.PathLike) -> set[str]:
    """What the pickles in a file would import, as "module name", without unpickling; empty for other files.

    A name that cannot be read off the opcodes for certain is given as "? ?".

    Raises:
        zipfile.BadZipFile, OSError: A zip archive that is damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                found = set()
                for member in archive.infolist():
                    if member.filename.endswith((".pkl", ".pickle")):
                        if member.file_size > MAX_INDEX_BYTES:
                            return {"? ?"}
                        found |= _globals(io.BytesIO(archive.read(member)))
                return found
        file.seek(0)
        if path.suffix not in PICKLE_SUFFIXES and head[:1] != b"\x80" and not _is_old_pickle(file):
            return set()
        file.seek(0)
        return _globals(file)


def _is_old_pickle(file) -> bool:
    """Whether a file of any name is a whole pickle of protocol 0 or 1, which begin with no mark, that imports."""
    imports = False
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                imports = re.fullmatch(r"[\w.]+ [\w.]+", str(argument)) is not None
                if not imports:  # text whose line begins with c or i
                    return False
    except Exception:  # what genops raises depends on the bytes; all of it means that this is no pickle
        return False
    return imports


def code_in_pickles(path: str | os.PathLike) -> list[str]:
    """What the pickles in a file import beyond tensors, arrays and containers: what could be code."""
    return sorted(
        name.replace(" ", ".")
        for name in pickle_globals(path)
        if not _TENSOR_GLOBALS.fullmatch(name) and not _PLAIN_GLOBALS.fullmatch(name)
    )


def _globals(file) -> set[str]:
    found: set[str] = set()
    while True:  # files from before torch 1.6 are several pickles in a row, then raw bytes
        memo: dict[int, str] = {}
        before: list[tuple[str, str | None]] = []  # the opcodes since the last that was neither text nor memo
        try:
            for opcode, argument, _ in pickletools.genops(file):
                name = opcode.name
                if name in ("GLOBAL", "INST"):
                    found.add(str(argument))
                elif name == "STACK_GLOBAL":
                    texts = [text for kind, text in before if kind == "text"]
                    # Anything but two texts right before could have put other names on the stack than it shows.
                    known = len(texts) == 2 and None not in texts
                    found.add(f"{texts[0]} {texts[1]}" if known else "? ?")
                elif name in ("EXT1", "EXT2", "EXT4"):
                    found.add("? ?")
                if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                    index = len(memo) if name == "MEMOIZE" else int(str(argument))
                    memo[index] = (before[-1][1] if before else None) or "?"
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    before = [*before[-1:], ("text", memo.get(int(str(argument))))]
                elif "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
                    before = [*before[-1:], ("text", str(argument))]
                else:
                    before = []
        except Exception as error:
            # What no unpickler reads either ends here; what only this reader cannot is not to be trusted.
            if not isinstance(error, ValueError) or not re.search("unknown|exhausted", str(error)):
                found.add("? ?")
            return found
        if not file.read(1):
            return found
        file.seek(-1, os.SEEK_CUR)


def shown(value: Any) -> str:
    """A value of a file in an error message: a few bytes in a pickle can nest to any size."""
    return _REPR.repr(value)


def check_plain(value: Any, name: str, where: str) -> None:
    """That `value` is numbers, text, None, and lists and dicts of those, no more than a file should hold.

    Raises:
        SLAStateFormatError: Names the first thing that is not.
    """
    pending = [(value, 0)]
    seen = 0
    while pending:
        item, depth = pending.pop()
        seen += 1
        if seen > MAX_PLAIN_VALUES or depth > MAX_PLAIN_DEPTH:
            raise SLAStateFormatError(f"{where}: {name!r} holds too many values, or nests too deep")
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise SLAStateFormatError(f"{where}: {name!r} has a key that is not text")
            pending += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            pending += [(inner, depth + 1) for inner in item]
        elif not isinstance(item, str | int | float | bool | None):
            raise SLAStateFormatError(f"{where}: {name!r} holds a {type(item).__name__}, not a plain value")


def parse_json(text: str, name: str, where: str) -> Any:
    """JSON from a file's header, as `check_plain` allows it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SLAStateFormatError(f"{where}: {name!r} is not JSON") from error
    check_plain(value, name, where)
    return value


def _check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise SLAStateFormatError(
                f"{path} is a Git LFS pointer, which stands for a file that was not fetched; `git lfs pull` fetches it"
            )


def _check_archive(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if not end:
            raise SLAStateFormatError(f"{path} is damaged: not an archive such as torch.save writes")
        directory, comment, location = end[5], end[8], end[9]
        if directory > MAX_INDEX_BYTES or comment or location != size - 22:
            raise SLAStateFormatError(f"{path} is damaged: it holds more than a state needs")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = {member.filename for member in members}
    if len(names) != len(members) or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise SLAStateFormatError(f"{path} is damaged: not an archive such as torch.save writes")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise SLAStateFormatError(f"{path} is compressed, which torch.save never does")
        if member.filename.endswith("/data.pkl") and member.file_size > MAX_INDEX_BYTES:
            raise SLAStateFormatError(f"{path} is damaged: its index has {member.file_size} bytes")
    if sum(member.file_size for member in members) > size:
        raise SLAStateFormatError(f"{path} is damaged: it claims to be larger inside than outside")


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (SLAError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:160]
        raise SLAStateFormatError(f"{path} is damaged: {type(error).__name__}: {first}") from error
