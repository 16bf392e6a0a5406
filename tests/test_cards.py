import logging

import pytest
import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from huggingface_hub import ModelCard

from diffusers_sla import SLAConfig, SLAHubError
from diffusers_sla.cards import Card, render_card
from diffusers_sla.state import SLAState


def card(kind="state", **keywords):
    meta = {"base_model": "acme/base", "models": {"transformer": "WanTransformer3DModel"}, **keywords.pop("meta", {})}
    tensors = {"proj_l.weight": torch.zeros(8, 8), "proj_l.bias": torch.zeros(8)}
    layers = {f"transformer.blocks.{i}.attn1": tensors for i in range(3)}
    return Card("you/x", SLAState(SLAConfig(topk=0.15).to_dict(), layers, meta), kind, **keywords)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(render_card(card(license="apache-2.0"))).data
    assert (data.library_name, data.base_model, data.license) == ("diffusers", "acme/base", "apache-2.0")
    assert (data.base_model_relation, data.pipeline_tag, data.inference) == ("adapter", "text-to-video", False)
    assert ModelCard(
        render_card(card("model", model_class="FluxTransformer2DModel", meta={"models": {}}))
    ).data.to_dict()["pipeline_tag"] == ("text-to-image")
    for name, tag in (("StableAudioDiTModel", "text-to-audio"), ("LTX2VideoTransformer3DModel", "text-to-video")):
        made = card("model", model_class=name, meta={"models": {}})
        assert ModelCard(render_card(made)).data.to_dict()["pipeline_tag"] == tag
    assert ModelCard(render_card(card("pipeline"))).data.base_model_relation == "finetune"
    assert "base_model" not in ModelCard(render_card(card(meta={"base_model": None}))).data.to_dict()


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (card(), 'pipe = DiffusionPipeline.from_pretrained("acme/base", '),
        (card("lora", lora="l.safetensors"), 'pipe.load_lora_weights("you/x", weight_name="l.safetensors")'),
        (
            card(
                "lora", lora="l.safetensors", subfolder="v2", meta={"models": {"transformer": "DiTTransformer2DModel"}}
            ),
            'add_lora(pipe, hf_hub_download("you/x", "l.safetensors", subfolder="v2"))',
        ),
        (card("pipeline"), 'pipe = DiffusionPipeline.from_pretrained("you/x", '),
        (
            card("model", model_class="WanTransformer3DModel", component="transformer", subfolder="v2"),
            'model = WanTransformer3DModel.from_pretrained("you/x", subfolder="v2/transformer", ',
        ),
        (card("model", model_class="WanTransformer3DModel"), 'load_sla_weights(model, "you/x")'),
    ],
)
def test_the_usage_fits_what_is_in_the_repository(made, line):
    text = render_card(made)
    assert line in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) <= 10


@pytest.mark.parametrize(
    ("pipeline", "model"),
    [
        (DiTPipeline, DiTTransformer2DModel),
        (PixArtSigmaPipeline, PixArtTransformer2DModel),
        (StableDiffusionXLPipeline, UNet2DConditionModel),
        (WanPipeline, WanTransformer3DModel),
    ],
)
def test_a_lora_is_loaded_by_the_pipeline_where_that_can(pipeline, model):
    code = render_card(card("lora", lora="l.safetensors", meta={"models": {"x": model.__name__}}))
    assert ("pipe.load_lora_weights(" in code) == hasattr(pipeline, "load_lora_weights")
    assert ("add_lora(" in code) != hasattr(pipeline, "load_lora_weights")


def test_records_become_tables_and_their_text_stays_in_its_cell():
    meta = {
        "speed": [{"GPU": "H100", "ms": 1.23456}, {"GPU": "a|b\n<script>", "L": 4096}],
        "quality": "not rows",
        "training": {"steps": 10, "losses": [1, 2.5]},
    }
    text = render_card(card(meta=meta))
    assert (
        "### Speed\n\n| GPU | ms | L |\n| --- | --- | --- |\n| H100 | 1.235 |  |\n| a\\|b &lt;script> |  | 4096 |\n"
        in text
    )
    assert "### Quality" not in text
    assert "| losses | 1, 2.5 |" in text
    assert "3 attention layers of head size 8" in text
    assert "the 15% of key blocks" in text


def test_what_leaving_sla_out_does_is_told():
    assert "its own weights are untouched" in render_card(card())
    assert "was not measured for this repository" in render_card(card("lora"))
    quality = {"quality": [{"run": "without SLA", "PSNR": 20.0}]}
    assert "The quality table shows what happens without it" in render_card(card("lora", meta=quality))


def test_rendering_again_changes_nothing(caplog):
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    first = render_card(card())
    assert render_card(card(), first) == first
    with_text = render_card(card(), "# Mine\n\nNo front matter.\n")
    assert "# Mine\n\nNo front matter.\n\n<!-- diffusers-sla: begin -->" in with_text
    assert render_card(card(), with_text) == with_text
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert not caplog.messages


def test_values_in_records_are_not_templates():
    assert "{{ 7 * 7 }}" in render_card(card(meta={"training": {"note": "{{ 7 * 7 }}"}}))


def test_a_front_matter_that_is_not_yaml_is_refused():
    with pytest.raises(SLAHubError, match="is not valid"):
        render_card(card(), "---\n: [\n---\n")
