import contextlib
import json
import os
import pickle
import struct

import pytest
import torch

import diffusers_sla.state
from diffusers_sla import SLAConfig, SLAStateError, SLAStateFormatError, SLAStateNotFoundError, SLAStateVersionError
from diffusers_sla.state import SLAState, read_state, write_state


def make_state(D=8):
    tensors = {"proj_l.weight": torch.randn(D, D), "proj_l.bias": torch.randn(D), "proj_s.weight": torch.eye(D)}
    return SLAState(SLAConfig(topk=0.1).to_dict(), {"transformer.blocks.0.attn1": tensors}, {"step": 7})


def assert_same(a, b):
    assert (a.settings, a.meta, a.layers.keys()) == (b.settings, b.meta, b.layers.keys())
    for name, tensors in a.layers.items():
        assert tensors.keys() == b.layers[name].keys()
        assert all(torch.equal(tensors[key], b.layers[name][key]) for key in tensors)


@pytest.mark.parametrize("name", ["sla_attention.pt", "sla_attention.safetensors"])
def test_what_is_written_is_read_again(tmp_path, name):
    state = make_state()
    write_state(state, tmp_path / name)
    assert_same(read_state(tmp_path / name), state)
    assert_same(read_state(tmp_path), state)
    assert os.listdir(tmp_path) == [name]


def test_the_pt_file_is_the_documented_dict(tmp_path):
    write_state(make_state(), tmp_path / "sla_attention.pt")
    payload = torch.load(tmp_path / "sla_attention.pt", weights_only=True)
    assert list(payload) == ["format", "version", "settings", "state", "meta", "digest"]
    assert (payload["format"], payload["version"], payload["settings"]["topk"]) == ("diffusers_sla", 2, 0.1)
    assert set(payload["state"]["transformer.blocks.0.attn1"]) == {"proj_l.weight", "proj_l.bias", "proj_s.weight"}


def test_version_1_is_read_and_written(tmp_path):
    tensors = {"proj_l.weight": torch.randn(8, 8).bfloat16(), "proj_l.bias": torch.zeros(8).bfloat16()}
    payload = {"settings": {"topk": 0.2, "blkq": 64}, "state": {"8:bf16": tensors}, "version": 1}
    state = read_state(payload)
    assert state.layers == {}
    assert state.by_head_dim[8]["proj_l.weight"].dtype is torch.float32
    assert torch.equal(state.by_head_dim[8]["proj_l.weight"], tensors["proj_l.weight"].float())
    write_state(state, tmp_path / "v1.pt", version=1)
    again = torch.load(tmp_path / "v1.pt", weights_only=True)
    assert (again["version"], list(again["state"]), again["settings"]) == (1, ["8:bf16"], payload["settings"])


def test_version_1_refuses_what_it_cannot_hold(tmp_path):
    state = make_state()
    with pytest.raises(SLAStateError, match="no place for proj_s"):
        write_state(state, tmp_path / "v1.pt", version=1)
    del state.layers["transformer.blocks.0.attn1"]["proj_s.weight"]
    other = {key: tensor + 1 for key, tensor in state.layers["transformer.blocks.0.attn1"].items()}
    state.layers["transformer.blocks.1.attn1"] = other
    with pytest.raises(SLAStateError, match=r"blocks\.1\.attn1 has its own"):
        write_state(state, tmp_path / "v1.pt", version=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "key",
    [
        "blocks.3.self_attn.attn_op.local_attn.proj_l.weight",
        "net.blocks.3.self_attn.attn_op.local_attn.proj_l.weight",
        "blocks.3.attn1.attn_op.local_attn.proj_l.weight",
        "blocks.3.attn1.attn_impl.proj_l.weight",
    ],
)
def test_other_projects_keys_are_understood(key):
    state = read_state({key: torch.ones(4, 4), "blocks.3.ffn.weight": torch.ones(2)})
    assert state.settings is None
    assert torch.equal(state.layers["transformer.blocks.3.attn1"]["proj_l.weight"], torch.ones(4, 4))


def payload(**change):
    tensors = {"proj_l.weight": torch.zeros(4, 4), "proj_l.bias": torch.zeros(4)}
    return {"format": "diffusers_sla", "version": 2, "settings": {}, "state": {"t.a": tensors}, "meta": {}} | change


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (payload(version=3), SLAStateVersionError, "version 3, this package reads up to 2"),
        (payload(version="2"), SLAStateFormatError, "impossible version '2'"),
        (payload(format="other"), SLAStateFormatError, "not an SLA state"),
        (payload(state=[1]), SLAStateFormatError, "'state' is not a dict"),
        (payload(state={"t.a": {"proj_x": torch.zeros(4)}}), SLAStateFormatError, "unknown tensor 'proj_x'"),
        (payload(state={"t.a": {"proj_l.bias": torch.zeros(4, 4)}}), SLAStateFormatError, "impossible shape"),
        (payload(state={"t.a": {"proj_l.bias": torch.zeros(4).long()}}), SLAStateFormatError, "floating point"),
        (payload(state={"t.a": {"proj_l.bias": torch.full((4,), torch.nan)}}), SLAStateFormatError, "NaN"),
        ({"a": 1}, SLAStateFormatError, "not an SLA state"),
        ({}, SLAStateFormatError, "not an SLA state"),
    ],
)
def test_bad_contents_are_named(bad, error, message):
    with pytest.raises(error, match=message):
        read_state(bad)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(SLAStateNotFoundError, match=r"has no sla_attention\.pt; save_sla_weights\(pipe"):
        read_state(tmp_path)
    with pytest.raises(OSError, match="there is no state file"):
        read_state(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["sla_attention.pt", "sla_attention.safetensors"])
def test_a_file_cut_anywhere_or_damaged_is_refused_or_whole(tmp_path, name):
    path = tmp_path / name
    write_state(make_state(), path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for cut in torch.randint(0, len(whole) - 1, (40,), generator=generator).tolist():
        path.write_bytes(whole[:cut])
        with pytest.raises(SLAStateError):
            read_state(path)
    for at in torch.randint(0, len(whole), (100,), generator=generator).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(SLAStateError):  # a flipped bit inside a tensor may pass; nothing else may be raised
            read_state(path)


def test_a_pickle_with_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "sla_attention.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SLAStateFormatError):
        read_state(tmp_path)
    torch.save({"format": "diffusers_sla", "state": Evil()}, tmp_path / "sla_attention.pt")
    with pytest.raises(SLAStateFormatError):
        read_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_huge_header_is_refused(tmp_path):
    header = json.dumps({"a": 1}).encode()
    (tmp_path / "sla_attention.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + header)
    with pytest.raises(SLAStateFormatError, match="damaged"):
        read_state(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sla_attention.pt"
    state = make_state()
    write_state(state, path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_sla.state.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_state(make_state(), path)
    assert_same(read_state(path), state)
    assert os.listdir(tmp_path) == ["sla_attention.pt"]


@pytest.mark.parametrize("name", ["sla_attention.pt", "sla_attention.safetensors"])
def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path, name):
    state = make_state()
    write_state(state, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    values = state.layers["transformer.blocks.0.attn1"]["proj_l.weight"].numpy().tobytes()
    at = data.find(values)
    assert at > 0
    (tmp_path / name).write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    with pytest.raises(SLAStateFormatError, match="its contents are not what was saved"):
        read_state(tmp_path)


def test_equal_states_are_equal_bytes_and_have_one_digest(tmp_path):
    state = make_state()
    for suffix in ("pt", "safetensors"):
        for name in "abcdef":  # safetensors would write several header entries in an order of its own each time
            write_state(state, tmp_path / f"{name}.{suffix}")
        assert len({(tmp_path / f"{name}.{suffix}").read_bytes() for name in "abcdef"}) == 1
    assert read_state(tmp_path / "a.pt").digest() == read_state(tmp_path / "a.safetensors").digest() == state.digest()
    state.settings["topk"] = 0.2
    assert read_state(tmp_path / "a.pt").digest() != state.digest()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    state = make_state()
    state.layers["transformer.blocks.0.attn1"]["proj_l.bias"][0] = torch.nan
    with pytest.raises(SLAStateFormatError, match="holds NaN"):
        write_state(state, tmp_path / "a.pt")
    state = make_state()
    state.meta["path"] = tmp_path
    with pytest.raises(SLAStateFormatError, match="'meta' holds a PosixPath, not a plain value"):
        write_state(state, tmp_path / "a.pt")
    with pytest.raises(SLAStateError, match="this state has no settings"):
        write_state(SLAState(None, {}), tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []
