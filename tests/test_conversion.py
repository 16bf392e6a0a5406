import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import WanTransformer3DModel
from models import make, output
from safetensors.torch import load_file, save_file

from diffusers_sla import (
    SLAConfig,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateFormatError,
    apply_sla,
    load_sla_weights,
    save_sla_weights,
    sla_layers,
    sla_parameters,
)
from diffusers_sla.cli import main
from diffusers_sla.conversion import convert
from diffusers_sla.foreign import LAYOUTS
from diffusers_sla.state import read_state

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)
# Diffusers' names -> those of the original Wan code, written down from that code and not from diffusers' converter.
ORIGINAL = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."),
    (".add_k_proj.", ".k_img."), (".add_v_proj.", ".v_img."), (".norm_added_k.", ".norm_k_img."),
    (".to_out.0.", ".o."), (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."), (".norm2.", ".norm3."),
    (".scale_shift_table", ".modulation"), ("proj_out.", "head.head."),
)  # fmt: skip


def original_checkpoint(model, projections=True):
    """What TurboDiffusion's trainer would have saved of a diffusers model with SLA on it."""
    checkpoint = {}
    for name, tensor in model.state_dict().items():
        if ".processor." in name:
            continue
        if name == "scale_shift_table":
            name = "head.modulation"
        for ours, theirs in ORIGINAL:
            name = name.replace(ours, theirs)
        checkpoint[name] = tensor.reshape(tensor.shape[0], -1) if name == "patch_embedding.weight" else tensor
    if projections:
        for layer, bound in sla_layers(model).items():
            key = layer.removeprefix("transformer.").replace("attn1", "self_attn.attn_op.local_attn.proj_l")
            checkpoint[f"{key}.weight"] = bound.state.proj_l_weight.detach()
            checkpoint[f"{key}.bias"] = bound.state.proj_l_bias.detach()
    return checkpoint


@pytest.fixture
def trained():
    model, inputs = make("wan")
    apply_sla(model, SPARSE)
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.normal_(std=0.3)
    return model, inputs


def same(a, b):
    assert a.layers.keys() == b.layers.keys()
    for layer, tensors in a.layers.items():
        assert all(torch.equal(tensor, b.layers[layer][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_a_whole_wan_checkpoint_becomes_a_transformer_and_a_state(tmp_path, trained, prefix, suffix):
    model, inputs = trained
    checkpoint = {prefix + name: tensor.contiguous() for name, tensor in original_checkpoint(model).items()}
    source = tmp_path / f"TurboWan{suffix}"
    if suffix == ".safetensors":
        save_file(checkpoint, source)
    else:
        torch.save({"state_dict": checkpoint, "step": 3} if prefix else checkpoint, source)
    convert(source, tmp_path / "out", config=SPARSE)
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    load_sla_weights(again, tmp_path / "out")
    assert {layer.config for layer in sla_layers(again).values()} == {SPARSE}
    torch.testing.assert_close(output(again, inputs), output(model, inputs), rtol=0, atol=0)


@torch.no_grad()
def test_an_image_to_video_checkpoint_is_converted_too(tmp_path):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, image_dim=20, added_kv_proj_dim=24,
    )  # fmt: skip
    apply_sla(model, SPARSE)
    torch.save(original_checkpoint(model), tmp_path / "i2v.pth")
    convert(tmp_path / "i2v.pth", tmp_path / "out")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    ours = {name: tensor for name, tensor in model.state_dict().items() if ".processor." not in name}
    assert ours.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.items())
    assert read_state(tmp_path / "out").settings["blkq"] == 128  # what TurboDiffusion runs with


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("blocks.1.ffn.0.bias"), r"has no blocks\.1\.ffn\.net\.0\.proj\.bias"),
        (lambda c: c.update({"extra.weight": torch.zeros(2)}), r"no place for: extra\.weight"),
        (lambda c: c.update({"blocks.0.ffn.2.bias": torch.zeros(5)}), r"another shape for blocks\.0\.ffn\.net\.2"),
        (lambda c: c.update({"blocks.0.ffn.2.weight": torch.zeros(4).to(torch.int8)}), r"is quantized"),
        (lambda c: c.pop("text_embedding.0.weight"), r"it has no proper text_embedding\.0\.weight"),
    ],
)
def test_a_checkpoint_that_is_not_wans_is_refused_by_name(tmp_path, trained, spoil, message):
    checkpoint = original_checkpoint(trained[0])
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "w.pth")
    with pytest.raises(SLAStateFormatError, match=message):
        convert(tmp_path / "w.pth", tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_projects_layouts_go_there_and_back(tmp_path, trained, layout, suffix):
    save_sla_weights(trained[0], tmp_path)
    theirs = tmp_path / f"theirs{suffix}"
    convert(tmp_path, theirs, layout=layout)
    keys = load_file(theirs) if suffix == ".safetensors" else torch.load(theirs)
    assert LAYOUTS[layout].key.format(block=1) + ".bias" in keys
    convert(theirs, tmp_path / "back.safetensors", config=SPARSE)
    back, first = read_state(tmp_path / "back.safetensors"), read_state(tmp_path)
    same(back, first)
    assert back.settings == first.settings


def test_a_version_1_file_gets_its_layers_from_the_model(tmp_path, trained, hub, repo_id):
    tensors = {"proj_l.weight": torch.randn(12, 12), "proj_l.bias": torch.randn(12)}
    torch.save({"settings": {"topk": 0.3}, "state": {"12:bf16": tensors}, "version": 1}, tmp_path / "v1.pt")
    with pytest.raises(SLAStateError, match="does not name its layers; give the model"):
        convert(tmp_path / "v1.pt", tmp_path / "out")
    make("wan")[0].save_pretrained(tmp_path / "model" / "transformer")
    convert(tmp_path / "v1.pt", tmp_path / "out", model=tmp_path / "model")
    state = read_state(tmp_path / "out")
    assert list(state.layers) == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    assert state.settings["topk"] == 0.3
    assert torch.equal(state.layers["transformer.blocks.1.attn1"]["proj_l.weight"], tensors["proj_l.weight"])
    from diffusers_sla.hub import push_files

    path = "transformer/config.json"
    push_files(repo_id, lambda _: {path: tmp_path / "model" / path, "transformer/x.safetensors": b"x"}, message="Add")
    hub.requests.clear()
    convert(tmp_path / "v1.pt", tmp_path / "out2", model=repo_id)
    same(read_state(tmp_path / "out2"), state)
    assert not any("x.safetensors" in request for request in hub.requests)
    convert(tmp_path / "out", tmp_path / "v1-again.pt", layout="simpletuner")
    again = torch.load(tmp_path / "v1-again.pt")
    assert (again["version"], list(again["state"]), again["settings"]["topk"]) == (1, ["12:bf16"], 0.3)


def test_what_a_layout_has_no_place_for_is_refused(tmp_path, trained):
    next(iter(sla_layers(trained[0]).values())).state.add_proj_s()
    save_sla_weights(trained[0], tmp_path)
    for layout in ("sglang", "simpletuner"):
        with pytest.raises(SLAStateError, match="no place for"):
            convert(tmp_path, tmp_path / "x.pt", layout=layout)
        assert not (tmp_path / "x.pt").exists()
    with pytest.raises(SLAStateError, match="is one file; name it"):
        convert(tmp_path, tmp_path / "folder", layout="sglang")
    with pytest.raises(SLASettingsConflictError, match=r"topk is 0\.25 in .* and 0\.5 here"):
        convert(tmp_path, tmp_path / "x.pt", config={"topk": 0.5})
    assert not (tmp_path / "x.pt").exists()


def test_settings_that_are_named_need_only_be_right(tmp_path, trained):
    save_sla_weights(trained[0], tmp_path)
    settings = read_state(tmp_path).settings
    convert(tmp_path, tmp_path / "x.safetensors", config={"topk": settings["topk"]})
    assert read_state(tmp_path / "x.safetensors").settings == settings


def test_a_file_from_before_min_length_keeps_running_sla_at_every_length(tmp_path, trained):
    save_sla_weights(trained[0], tmp_path)
    old = torch.load(tmp_path / "sla_attention.pt")
    del old["settings"]["min_length"]
    del old["digest"]
    torch.save(old, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "new.pt")
    assert read_state(tmp_path / "new.pt").settings["min_length"] == 0


def test_the_command_says_what_it_wrote_and_with_which_settings(tmp_path, trained):
    torch.save(original_checkpoint(trained[0]), tmp_path / "w.pth")
    arguments = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), "--base-model", "a/b", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    names = ["transformer", "sla_attention.pt", "sla_attention.safetensors"]
    assert json.loads(result.stdout) == {"written": [str(tmp_path / "out" / name) for name in names]}
    assert "the file holds no settings; wrote what its project runs with" in result.stderr
    assert read_state(tmp_path / "out").meta["base_model"] == "a/b"
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "none.pt"), str(tmp_path / "x.pt")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
