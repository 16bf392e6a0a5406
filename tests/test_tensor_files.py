import os
import pickle
import struct
import zipfile

import numpy
import pytest
import torch
from mutants import Calls, pickle_of
from safetensors.torch import save_file

from diffusers_sla import SLAStateFormatError
from diffusers_sla.state import read_state
from diffusers_sla.tensor_files import (
    check_plain,
    code_in_pickles,
    load_pt,
    open_safetensors,
    parse_json,
    pickle_globals,
    shown,
)


def repacked(path, compression=zipfile.ZIP_STORED, **extra):
    """The archive at `path` written anew."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in {**members, **extra}.items():
            archive.writestr(name, contents)


def test_a_pt_file_is_read_and_its_tensors_stay_on_disk(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": [1, "x", None]}, path)
    found = load_pt(path)
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert found["b"] == [1, "x", None]
    assert not found["a"].untyped_storage().resizable()  # a part of the mapped file, not a copy


@pytest.mark.parametrize("name", [".pt", ".safetensors"])
def test_what_git_lfs_leaves_in_place_of_a_file_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / f"sla_attention{name}").write_text(pointer)
    with pytest.raises(SLAStateFormatError, match=rf"{name} is a Git LFS pointer.*`git lfs pull` fetches it"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: repacked(path, zipfile.ZIP_DEFLATED), "is compressed, which torch.save never does"),
        (lambda path: repacked(path, **{"b/data.pkl": b"N."}), "not an archive such as torch.save writes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "it holds more than a state needs"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "not an archive such as torch.save writes"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: torch.save({"a": torch.device("cpu")}, path), r"its pickle imports torch\.device"),
        (lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False), "not an archive"),
    ],
)
def test_what_torch_save_does_not_write_is_refused(tmp_path, spoil, message):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(3)}, path)
    spoil(path)
    with pytest.raises(SLAStateFormatError, match=message):
        load_pt(path)


def test_a_directory_that_lies_about_sizes_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(3)}, path)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2", data.find(b"PK\1\2") + 1)
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(bytes(data))
    with pytest.raises(SLAStateFormatError, match="larger inside than outside"):
        load_pt(path)


def test_safetensors_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, path, metadata={"k": "v"})
    with open_safetensors(path) as (header, tensors):
        assert (header, list(tensors), len(tensors)) == ({"k": "v"}, ["a", "b"], 2)
        assert torch.equal(tensors["b"], torch.zeros(3))
        assert tensors.get("c") is None
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with (
        pytest.raises(SLAStateFormatError, match="its header claims 4611686018427387904 bytes"),
        open_safetensors(path),
    ):
        pass


def test_imports_are_read_off_the_opcodes(tmp_path):
    path = tmp_path / "a.pkl"
    for protocol in range(6):
        path.write_bytes(pickle.dumps([Calls("os", "mkdir", ("x",)), Calls("math", "sqrt", (4,))], protocol))
        assert pickle_globals(path) == {f"{os.name} mkdir", "math sqrt"}
    path.write_bytes(pickle.dumps({"a": [1, "os mkdir", b"cos\nsystem\n"]}))
    assert pickle_globals(path) == set()
    (tmp_path / "a.txt").write_text("cos\nsystem\n.")  # a whole pickle, whatever it is called
    assert pickle_globals(tmp_path / "a.txt") == {"os system"}
    (tmp_path / "a.txt").write_text("cos\nsystem\n")
    assert pickle_globals(tmp_path / "a.txt") == set()


def test_no_way_of_naming_a_function_goes_unseen(tmp_path):
    import random

    path = tmp_path / "a.pt"
    seen = set()
    for seed in range(200):
        data = pickle_of(random.Random(seed), str(tmp_path / "ran"))
        path.write_bytes(data)
        assert code_in_pickles(path), data
        seen.add(data)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", data)
        assert code_in_pickles(path), data
    assert len(seen) >= 11


def test_pickles_of_tensors_and_arrays_hold_no_code(tmp_path):
    path = tmp_path / "a.pt"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    for content in (
        optimizer.state_dict(),
        {"d": torch.float16, "s": torch.Size([1])},
        torch.ones(2, dtype=torch.bool),
    ):
        torch.save(content, path)
        assert code_in_pickles(path) == []
    torch.save(torch.ones(2), path, _use_new_zipfile_serialization=False)
    assert code_in_pickles(path) == []
    path.write_bytes(pickle.dumps({"numpy": numpy.random.get_state(), "array": numpy.arange(3.0)}))
    assert code_in_pickles(path) == []


def test_plain_values_have_a_limit():
    check_plain({"a": [1, 2.5, None, True, "x", {"b": []}]}, "meta", "f")
    doubled = "x"
    for _ in range(60):
        doubled = [doubled, doubled]
    deep = []
    for _ in range(20):
        deep = [deep]
    for value in (doubled, deep, {"a": b"x"}, {1: 2}, {"a": torch.ones(1)}, [0] * 100_001):
        with pytest.raises(SLAStateFormatError, match="f: 'meta'"):
            check_plain(value, "meta", "f")
    assert len(shown(doubled)) < 1000
    with pytest.raises(SLAStateFormatError, match="is not JSON"):
        parse_json("[" * 100_000, "meta", "f")


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("name", ["data.bin", "data.joblib", "data"])
def test_a_pickle_is_known_by_its_contents_whatever_its_name(tmp_path, protocol, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(os.getcwd, protocol))
    assert code_in_pickles(path) == ["posix.getcwd"]
    path.write_text("class Text:\n    pass\n.")
    assert name == "data.bin" or code_in_pickles(path) == []
