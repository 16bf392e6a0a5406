import json

import pytest
import torch
from models import make, output
from pipelines import SIZES, make_pipeline

from diffusers_sla import (
    SLAConfigError,
    SLAUnsupportedError,
    apply_sla,
    load_sla_weights,
    record,
    save_sla_weights,
    sla_disabled,
    sla_layers,
    sla_parameters,
)
from diffusers_sla.generation import Request
from diffusers_sla.training import calibrate, calibration, fold_proj_s
from diffusers_sla.training.calibration import branches

CONFIG = {"topk": 0.25, "blkq": 16, "blkk": 16}


def requests(name, count, steps=3):
    what = {"class_label": "cat"} if name == "dit" else {"prompt": "a red cat"}
    return [Request(**what, seed=i, steps=steps, guidance_scale=1.0, **SIZES[name]) for i in range(count)]


def sharpen(pipe):
    """Random models attend almost evenly, where SLA has nothing to lose: larger queries make a difference."""
    model = getattr(pipe, "transformer", None) or pipe.unet
    for name, parameter in model.named_parameters():
        if "to_q.weight" in name or "to_k.weight" in name:
            parameter.data *= 6
    return model


@pytest.mark.parametrize("name", ["dit", "sd", "flux", "wan"])
def test_calibration_brings_attention_and_output_nearer_to_dense(name, tmp_path):
    pipe = make_pipeline(name)
    model = sharpen(pipe)
    report = calibrate(pipe, requests(name, 4), CONFIG)
    assert set(report.layers) == set(sla_layers(pipe))
    assert report.mean("error_after") < report.mean("error_before")
    assert all(fit.error_after <= fit.error_before for fit in report.layers.values())
    assert report.output_after < report.output_before
    assert (report.samples, report.held_out, report.steps) == (4, 1, 3)
    tokens = {"dit": 64, "sd": 256, "flux": 64, "wan": 32}[name]  # of the largest layer; no text among them
    assert report.tokens == 4 * 3 * 2 * tokens  # samples, steps, heads
    kept = any(fit.proj_s is not None for fit in report.layers.values())
    assert kept == any(layer.state.proj_s_weight is not None for layer in sla_layers(pipe).values())
    assert json.loads(report.to_json())["output_after"] == report.output_after
    assert f"{report.output_before:.4f} -> {report.output_after:.4f}" in str(report)
    # The error reported is the error there is, seen through a call of its own.
    save_sla_weights(pipe, tmp_path)
    other = make_pipeline(name)
    sharpen(other)
    load_sla_weights(other, tmp_path)
    ours = sla_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(ours, sla_parameters(other), strict=True))


@pytest.mark.parametrize("linear", ["all", "marginal", "none"])
def test_the_branches_add_up_to_what_the_layer_computes(linear):
    model, inputs = make("flux")
    apply_sla(model, CONFIG | {"linear": linear})
    layers = sla_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.state.add_proj_s().normal_(std=0.3)
            for weight in (layer.state.proj_l_weight, layer.state.proj_l_bias):
                if weight is not None:
                    weight.normal_(std=0.3)
        with record(model) as records:
            output(model, inputs)
        for call in records:
            layer = layers[call.layer]
            o_s, o_l = branches(
                layer, call.query, call.key, call.value, scale=None, key_mask=None, keep_q=call.kept, keep_k=call.kept
            )
            actual = o_s @ layer.state.proj_s_weight.T
            if o_l is not None:
                actual = actual + o_l @ layer.state.proj_l_weight.T + layer.state.proj_l_bias
            image = slice(call.kept[0], None)
            assert call.kept == (9, 0)
            torch.testing.assert_close(actual[:, :, image], call.output[:, :, image], rtol=1e-4, atol=1e-5)


def test_what_is_fitted_is_the_dense_attention_of_every_step_and_head():
    pipe = make_pipeline("dit")
    sharpen(pipe)
    report = calibrate(pipe, requests("dit", 2, steps=2), CONFIG)
    # 2 samples x 2 steps x 2 heads x 64 tokens; DiTPipeline calls once a step without guidance.
    assert report.tokens == 2 * 2 * 2 * 64
    assert all(layer.calls_sla > 0 for layer in sla_layers(pipe).values())
    fresh = make_pipeline("dit")
    sharpen(fresh)
    dense = fresh(class_labels=[0], num_inference_steps=2, guidance_scale=1.0, output_type="np",
                  generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    with sla_disabled(pipe):
        again = pipe(class_labels=[0], num_inference_steps=2, guidance_scale=1.0, output_type="np",
                     generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert (dense == again).all()


def test_every_fourth_sample_is_held_out(monkeypatch):
    seen = []
    real = calibration.fit_layer

    def watched(fitted, held_out):
        seen.append((fitted.rows, held_out.rows))
        return real(fitted, held_out)

    monkeypatch.setattr(calibration, "fit_layer", watched)
    made = [Request(class_label="cat", steps=steps, guidance_scale=1.0) for steps in (1, 2, 3, 7, 1)]
    assert calibrate(make_pipeline("dit"), made, CONFIG).held_out == 1
    assert seen == [((1 + 2 + 3 + 1) * 128, 7 * 128)] * 2


def test_layers_that_run_dense_are_left_alone_and_named():
    pipe = make_pipeline("sd")  # 256 tokens and 64
    report = calibrate(pipe, requests("sd", 2), CONFIG | {"min_length": 100})
    served = [name for name, layer in sla_layers(pipe).items() if layer.calls_sla]
    assert 0 < len(served) < len(sla_layers(pipe))
    assert list(report.layers) == served
    assert any("fewer than 100 tokens" in note for note in report.notes)
    with pytest.raises(SLAUnsupportedError, match=r"SLA served no call of any layer; .*fewer than 999 tokens"):
        calibrate(make_pipeline("sd"), requests("sd", 2), CONFIG | {"min_length": 999})


def test_calibration_needs_something_to_hold_out_and_something_to_fit():
    pipe = make_pipeline("dit")
    with pytest.raises(SLAConfigError, match="2 samples or more"):
        calibrate(pipe, requests("dit", 1))
    with pytest.raises(SLAConfigError, match="no class 'bird'"):
        calibrate(pipe, [Request(class_label="bird")] * 2)


@pytest.mark.parametrize("name", ["wan", "unet", "dit"])
@torch.no_grad()
def test_folding_changes_no_output(name):
    model, inputs = make(name)
    apply_sla(model, CONFIG)
    torch.manual_seed(3)
    for layer in sla_layers(model).values():
        layer.state.add_proj_s().add_(torch.randn_like(layer.state.proj_s_weight), alpha=0.1)
        layer.state.proj_l_weight.normal_(std=0.3)
        layer.state.proj_l_bias.normal_(std=0.3)
    before = output(model, inputs)
    assert fold_proj_s(model) == list(sla_layers(model))
    assert all(layer.state.proj_s_weight is None for layer in sla_layers(model).values())
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-4)


def test_folding_refuses_what_it_would_break():
    model, _ = make("flux")
    apply_sla(model, CONFIG)
    layers = sla_layers(model)
    single = next(name for name in layers if "single" in name)
    layers[single].state.add_proj_s()
    with pytest.raises(SLAUnsupportedError, match=r"single_transformer_blocks\.0\.attn has no output projection"):
        fold_proj_s(model)
    model, _ = make("wan")
    apply_sla(model, CONFIG)
    last = list(sla_layers(model).values())[-1]
    for layer in sla_layers(model).values():
        layer.state.add_proj_s()
    last.state.proj_s_weight.data.zero_()
    kept = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(SLAUnsupportedError, match=r"blocks.1.attn1 cannot be folded: its condition number"):
        fold_proj_s(model)
    assert all(torch.equal(kept[name], p) for name, p in model.state_dict().items())
