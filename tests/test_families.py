import copy
import importlib.util
import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from models import MODELS, REFUSED, make, output
from torch import nn

from diffusers_sla import (
    SLAConfig,
    SLAUnsupportedError,
    apply_sla,
    record,
    remove_sla,
    sla_attention,
    sla_layers,
    sla_parameters,
    sla_report,
)
from diffusers_sla import families as table
from diffusers_sla.apply import watch_attention

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)
EXPECTED_DENSE = {"cosmos3": {"the text attends to itself": 1}}


def _text_of(name, layer, queries):
    """Tokens of text that a layer's calls keep, by the tiny model's own count."""
    text = MODELS[name].text
    if (name == "sd3" and layer.endswith("attn2")) or "noise_refiner" in layer or "mode_blocks" in layer:
        return 0
    if name == "mochi":  # a call per sample, with its own text
        return queries - 128
    if name == "motif" and layer.endswith("single_transformer_blocks.1.attn"):
        return 128
    return text


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_block_and_a_zero_projection_is_the_native_model(name):
    model, inputs = make(name)
    expected = output(model, inputs)
    apply_sla(model, SLAConfig(topk=1.0, blkq=16, blkk=16), strict=True)
    actual = output(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    layers = sla_layers(model)
    assert len(layers) == MODELS[name].layers
    assert {layer.calls_sla for layer in layers.values()} == {MODELS[name].calls}
    assert all(layer.calls_dense == EXPECTED_DENSE.get(name, {}) for layer in layers.values())
    remove_sla(model)
    assert torch.equal(output(model, inputs), expected)
    assert not sla_layers(model)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_call_is_the_ops_with_the_text_kept(name):
    model, inputs = make(name)
    expected = output(model, inputs)
    apply_sla(model, SPARSE)
    for layer in sla_layers(model).values():
        layer.state.proj_l_weight.normal_(std=0.3)
    with record(model) as records:
        actual = output(model, inputs)
    assert (actual - expected).abs().max() > 2e-5 * expected.abs().max()  # a quarter of the blocks is not all of them
    assert {r.layer for r in records} == set(sla_layers(model))
    dense = sum(EXPECTED_DENSE.get(name, {}).values()) * MODELS[name].layers
    assert len(records) == MODELS[name].layers * MODELS[name].calls + dense
    for r in records:
        if name == "cosmos3" and r.query.shape[2] == 5:
            continue
        weights = sla_layers(model)[r.layer].state
        by_hand = sla_attention(
            r.query, r.key, r.value, topk=0.25, blkq=16, blkk=16, proj_l_weight=weights.proj_l_weight,
            proj_l_bias=weights.proj_l_bias, keep_q=r.kept, keep_k=r.kept_keys, key_mask=r.key_mask, impl="reference",
        )  # fmt: skip
        torch.testing.assert_close(r.output, by_hand, rtol=1e-4, atol=1e-5)
        assert sum(r.kept_keys) == _text_of(name, r.layer, r.query.shape[2])


# One of each kind by default, the others where there is time.
GRADIENTS = (
    "unet", "motion", "cascade", "dit", "prx", "flux", "sd3", "qwen", "chroma", "lumina2", "z_image", "hidream", "wan",
    "ltx2", "cogvideox", "cosmos3", "hunyuan_video", "mochi", "motif", "ace_step", "longcat_audio", "stable_audio3",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in GRADIENTS else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_gradients_are_those_of_the_definition(name):
    gradients = []
    for impl in ("eager", "reference"):
        model, inputs = make(name)
        apply_sla(model, SPARSE, strict=False)
        torch.manual_seed(1)
        for parameter in sla_parameters(model):
            nn.init.normal_(parameter, std=0.1)

        def watch(processor, query, key, value, key_mask, kept, run, impl=impl):
            if impl == "eager" or (name == "cosmos3" and query.shape[2] == 5):
                return run()
            state = processor.state
            kept_keys = processor.kept_keys(query, key, kept)
            return sla_attention(
                query, key, value, topk=0.25, blkq=16, blkk=16, proj_l_weight=state.proj_l_weight,
                proj_l_bias=state.proj_l_bias, key_mask=key_mask, keep_q=kept, keep_k=kept_keys, impl="reference",
            )  # fmt: skip

        with watch_attention(model, dict.fromkeys(sla_layers(model), watch)):
            output(model, inputs).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    eager, reference = gradients
    assert eager.keys() == reference.keys()
    assert sum(".state." in key for key in eager) == 2 * MODELS[name].layers
    assert len(eager) > 2 * MODELS[name].layers + 2
    largest = max(g.abs().max() for g in reference.values())
    for key in eager:
        torch.testing.assert_close(eager[key], reference[key], rtol=2e-3, atol=2e-5 * largest.item(), msg=key)


TEXT_INPUTS = {
    "ernie": ["text_bth"], "z_image": ["cap_feats"], "cosmos3": ["input_ids"],
    "hidream": ["encoder_hidden_states_t5", "encoder_hidden_states_llama3"],
    "hunyuan_video15": ["encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"],
    "framepack": ["encoder_hidden_states", "image_embeds"], "motif": ["encoder_hidden_states", "image_embeds"],
    "cascade": ["clip_text_pooled", "clip_text", "clip_img"],
}  # fmt: skip


def _with_other_text(name, inputs):
    inputs = dict(inputs)
    for key in TEXT_INPUTS.get(name, ["encoder_hidden_states"]):
        text = inputs[key]
        if isinstance(text, list):
            inputs[key] = [x + torch.randn_like(x) for x in text]
        else:
            inputs[key] = text + (torch.randn_like(text) if text.is_floating_point() else 7)
    return inputs


# Mochi's image tokens are modulated by its text already in front of the first layer.
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].text and name != "mochi"])
@torch.no_grad()
def test_the_kept_tokens_are_the_text(name):
    """Another text changes the keys of the first joint layer exactly where the table says that text sits."""
    keys, kept = [], []
    for change in (False, True):
        model, inputs = make(name)
        apply_sla(model, SPARSE, strict=False)
        if change:
            inputs = _with_other_text(name, inputs)
        with record(model) as records:
            output(model, inputs)
        first = next(r for r in records if sum(r.kept_keys))
        keys.append(first.key)
        kept.append(first.kept_keys)
    assert kept[0] == kept[1]
    changed = (keys[0] - keys[1]).abs().amax((0, 1, 3)) > 1e-6
    where = torch.zeros_like(changed)
    where[: kept[0][0]] = True
    where[len(where) - kept[0][1] :] = True
    if name == "auraflow":
        where[:8] = False  # its registers are kept like text, and know nothing of it yet
    assert torch.equal(changed, where)


MASKED = (
    "nucleus", "prx", "qwen", "chroma", "bria_fibo", "ernie", "hunyuan_image", "joyimage_plus", "krea2", "lumina2",
    "hunyuan_video", "hunyuan_video15", "mochi", "motif",
)  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_what_a_mask_hides_reaches_no_image_token(name):
    model, inputs = make(name)
    apply_sla(model, SPARSE, strict=True)
    for layer in sla_layers(model).values():
        layer.state.proj_l_weight.normal_(std=0.3)
    expected = output(model, inputs)
    key = TEXT_INPUTS.get(name, ["encoder_hidden_states"])[0]
    inputs = copy.deepcopy(inputs)
    inputs[key][-1, -3:] += 10  # the last sample's text is three tokens shorter
    actual = output(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    inputs[key][-1, 0] += 10
    assert not torch.allclose(output(model, inputs)[-1], expected[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["chroma", "bria_fibo"])
@torch.no_grad()
def test_masks_of_numbers_hide_the_same_keys(name):
    model, inputs = make(name)
    apply_sla(model, SPARSE, strict=True)
    expected = output(model, inputs)
    if name == "chroma":
        inputs["attention_mask"] = inputs["attention_mask"].float()
    else:
        mask = inputs["joint_attention_kwargs"]["attention_mask"]
        inputs["joint_attention_kwargs"] = {"attention_mask": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)}
    torch.testing.assert_close(output(model, inputs), expected)


@torch.no_grad()
def test_a_layer_on_its_own_does_not_guess_where_the_text_is():
    model, inputs = make("flux")
    apply_sla(model, SPARSE, strict=True)
    attn, x = model.single_transformer_blocks[0].attn, torch.randn(1, 73, 32)
    with pytest.raises(SLAUnsupportedError, match="called without its model, which counts the text"):
        attn(x)
    output(model, inputs)
    attn(x)


@torch.no_grad()
def test_a_product_of_segments_hides_the_padding_from_the_image():
    model, inputs = make("ideogram4")
    inputs["segment_ids"][1, :3] = -1  # text is padded on the left
    expected = output(model, inputs)
    apply_sla(model, SLAConfig(topk=1.0, blkq=16, blkk=16), strict=True)
    torch.testing.assert_close(output(model, inputs)[:, 7:], expected[:, 7:], rtol=1e-4, atol=1e-5)


def test_every_class_of_diffusers_has_a_verdict():
    missing = []
    for name in dir(diffusers):
        model = getattr(diffusers, name)
        if not inspect.isclass(model) or not issubclass(model, ModelMixin) or model is ModelMixin:
            continue
        place = inspect.getsourcefile(model)
        denoiser = any(f"/models/{folder}/" in place for folder in ("transformers", "unets", "controlnets"))
        if denoiser and "Multi" not in name and name not in table.FAMILIES and name not in table.REFUSED:
            missing.append(name)
    assert not missing
    assert not table.FAMILIES.keys() & table.REFUSED.keys()


def test_every_row_but_few_is_swept():
    swept = {type(make(name)[0]).__name__ for name in MODELS}
    assert table.FAMILIES.keys() - swept == {"DreamLiteTransformer2DModel"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_is_not_served_says_why(name):
    model, _ = make(name)
    reason = table.REFUSED[type(model).__name__]
    with pytest.raises(SLAUnsupportedError) as error:
        apply_sla(model)
    assert reason in str(error.value)
    assert sla_report(model).models == {"transformer": f"{type(model).__name__}: runs natively: {reason}"}


def test_an_unknown_class_gets_a_verdict():
    class NewTransformer(type(make("dit")[0])):
        pass

    model = make("dit")[0]
    assert table.family_of(model) == table.FAMILIES["DiTTransformer2DModel"]
    NewTransformer.__bases__ = (ModelMixin,)
    model.__class__ = NewTransformer
    report = sla_report(model)
    assert report.layers == {}
    assert "NewTransformer: unknown to this version of diffusers_sla, all of its 2" in str(report)


def test_the_page_is_in_step_with_the_table():
    path = Path(__file__).parent.parent / "docs" / "models.py"
    spec = importlib.util.spec_from_file_location("models_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_suffix(".md").read_text() == module.page(), "run python docs/models.py"
    readme = (path.parents[1] / "README.md").read_text()
    assert f"{len(table.FAMILIES)} model classes" in readme
    assert f"{len(table.REFUSED)} others" in readme
