import json

import pytest
import torch
from models import make, output

from diffusers_sla import (
    SLAConfig,
    SLASettingsConflictError,
    SLAStateError,
    SLAStateMismatchError,
    apply_sla,
    load_sla_weights,
    save_sla_weights,
    sla_layers,
    sla_parameters,
)
from diffusers_sla.weights import settings_for, sla_state

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


def trained(name="wan", config=SPARSE):
    model, inputs = make(name)
    apply_sla(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.normal_(std=0.3)
    return model, inputs


@pytest.mark.parametrize("name", ["wan", "unet", "flux", "sd3"])
@torch.no_grad()
def test_a_fresh_model_computes_the_same_with_the_saved_state(tmp_path, name):
    model, inputs = trained(name)
    next(iter(sla_layers(model).values())).state.add_proj_s().normal_()
    save_sla_weights(model, tmp_path)
    for source in (tmp_path, tmp_path / "sla_attention.pt", tmp_path / "sla_attention.safetensors"):
        fresh, _ = make(name)
        load_sla_weights(fresh, source)
        torch.testing.assert_close(output(fresh, inputs), output(model, inputs), rtol=0, atol=0)


def test_hedgehog_maps_are_saved_too(tmp_path):
    model, _ = trained(config=SLAConfig(feature_map="hedgehog", tie_feature_map_qk=False))
    save_sla_weights(model, tmp_path)
    fresh, _ = make("wan")
    load_sla_weights(fresh, tmp_path)
    assert len(sla_parameters(fresh)) == 8
    assert all(torch.equal(a, b) for a, b in zip(sla_parameters(fresh), sla_parameters(model), strict=True))


def test_version_1_goes_to_every_layer_of_its_head_size():
    weight = torch.randn(12, 12)
    model, _ = make("wan")
    load_sla_weights(
        model,
        {"settings": {"topk": 0.3}, "version": 1,
         "state": {"12:fp32": {"proj_l.weight": weight, "proj_l.bias": torch.ones(12)}}},
    )  # fmt: skip
    layers = list(sla_layers(model).values())
    assert [layer.config.topk for layer in layers] == [0.3, 0.3]
    assert all(torch.equal(layer.state.proj_l_weight, weight) for layer in layers)
    assert layers[0].state.proj_l_weight is not layers[1].state.proj_l_weight


def test_settings_that_contradict_are_an_error_unless_overridden(tmp_path):
    save_sla_weights(trained()[0], tmp_path)
    model, _ = make("wan")
    with pytest.raises(SLASettingsConflictError, match=r"topk is 0\.25 in the file and 0\.5 here"):
        load_sla_weights(model, tmp_path, config=SLAConfig(topk=0.5, blkq=16, blkk=16))
    assert not sla_layers(model)
    load_sla_weights(model, tmp_path, config=SLAConfig(topk=0.5, blkq=16, blkk=16), override=True)
    assert {layer.config.topk for layer in sla_layers(model).values()} == {0.5}
    with pytest.raises(SLASettingsConflictError):
        load_sla_weights(model, tmp_path)


@pytest.mark.parametrize("kind", [dict, json.dumps])
def test_a_dict_or_text_stands_for_the_settings_it_names_only(tmp_path, kind):
    save_sla_weights(trained()[0], tmp_path)
    model, _ = make("wan")
    load_sla_weights(model, tmp_path, config=kind({"topk": 0.25}))
    assert {layer.config for layer in sla_layers(model).values()} == {SPARSE}
    with pytest.raises(SLASettingsConflictError, match=r"^topk is 0\.25 in the file and 0\.5 here\. override=True"):
        load_sla_weights(model, tmp_path, config=kind({"topk": 0.5, "blkq": 16}))
    assert {layer.config for layer in sla_layers(model).values()} == {SPARSE}
    load_sla_weights(model, tmp_path, config=kind({"topk": 0.5}), override=True)
    assert {layer.config for layer in sla_layers(model).values()} == {SLAConfig(topk=0.5, blkq=16, blkk=16)}
    assert settings_for(tmp_path) == (SPARSE, "")
    assert settings_for(tmp_path, kind({"topk": 0.5})) == (
        SLAConfig(topk=0.5, blkq=16, blkk=16), "topk is 0.25 in the file and 0.5 here",
    )  # fmt: skip


@pytest.mark.parametrize("problem", ["missing", "extra", "shape", "tensor", "nan"])
def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path, problem):
    donor, _ = trained()
    state = sla_state(donor)
    first = "transformer.blocks.0.attn1"
    if problem == "missing":
        del state.layers[first]
    elif problem == "extra":
        state.layers["transformer.blocks.9.attn1"] = state.layers[first]
    elif problem == "shape":
        state.layers[first] = {"proj_l.weight": torch.zeros(4, 4), "proj_l.bias": torch.zeros(4)}
    elif problem == "tensor":
        del state.layers[first]["proj_l.bias"]
    else:
        state.layers[first]["proj_l.bias"][0] = torch.nan
    source = {"format": "diffusers_sla", "version": 2, "settings": state.settings, "state": state.layers, "meta": {}}
    model, inputs = make("wan")
    before = output(model, inputs)
    with pytest.raises(SLAStateError if problem == "nan" else SLAStateMismatchError):
        load_sla_weights(model, source)
    assert not sla_layers(model)
    assert torch.equal(output(model, inputs), before)
    model, _ = trained()
    kept = [p.clone() for p in sla_parameters(model)]
    with pytest.raises(SLAStateError):
        load_sla_weights(model, source)
    assert all(torch.equal(a, b) for a, b in zip(kept, sla_parameters(model), strict=True))


def test_a_model_without_sla_has_nothing_to_save(tmp_path):
    with pytest.raises(SLAStateError, match="there is no SLA on this model"):
        save_sla_weights(make("wan")[0], tmp_path)


def test_projections_that_are_offloaded_layer_by_layer_are_refused_by_name(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, _ = trained()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(SLAStateError, match="attn1 is offloaded one layer at a time"):
        save_sla_weights(model, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    save_sla_weights(model, tmp_path)


def test_a_bare_model_takes_the_state_of_a_pipelines_second_transformer():
    donor, _ = trained()
    state = sla_state(donor)
    layers = {name.replace("transformer.", "transformer_2.", 1): tensors for name, tensors in state.layers.items()}
    model, _ = make("wan")
    load_sla_weights(
        model, {"format": "diffusers_sla", "version": 2, "settings": state.settings, "state": layers, "meta": {}}
    )
    assert all(torch.equal(a, b) for a, b in zip(sla_parameters(model), sla_parameters(donor), strict=True))
