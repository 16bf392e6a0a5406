import pytest
import request_form
import serving
from models import make

from diffusers_sla import SLAConfig, apply_sla, save_sla_weights

SAMPLE = serving.Served(serving.MODELS["sample"], None)


@pytest.fixture
def saved(tmp_path):
    def save(**settings):
        return str(save_sla_weights(apply_sla(make("wan")[0], SLAConfig(**settings)), tmp_path))

    return save


def test_the_form_shows_the_settings_of_what_is_loaded_and_its_own_without(saved):
    topk, blkq, blkk, feature_map, linear, skip, dense = request_form._shown(
        SAMPLE, saved(topk=0.3, blkq=16, blkk=32, feature_map="hedgehog", linear="marginal", skip=0.1, dense_steps=[0])
    )
    shown = (topk.value, blkq, blkk, feature_map.value, linear, skip, dense.value)
    assert shown == (0.3, 16, 32, "hedgehog", "marginal", 0.1, 1)
    assert ("hedgehog", "hedgehog") in feature_map.choices
    topk, blkq, blkk, feature_map, linear, skip, dense = request_form._shown(SAMPLE, None)
    shown = (topk.value, blkq, blkk, feature_map.value, linear, skip, dense.value)
    assert shown == (0.05, 64, 64, "softmax", "all", 0.0, 0)
    assert ("hedgehog", "hedgehog") not in feature_map.choices


def test_trained_projections_keep_the_settings_that_the_form_has_no_input_for(saved):
    source = saved(topk=0.3, dense_layers=[1], min_length=5)
    wanted = SLAConfig(topk=0.5, blkq=16)
    assert request_form.trained_settings(wanted, source) == SLAConfig(
        topk=0.5, blkq=16, dense_layers=[1], min_length=5
    )


def test_what_the_sliders_cannot_say_is_kept_and_what_they_can_is_in_their_range(saved):
    source = saved(topk=0.01, dense_steps=[0, -1])
    topk, *_, dense = request_form._shown(SAMPLE, source)
    assert (topk.minimum, topk.value, dense.value) == (0.01, 0.01, 1)
    assert request_form.trained_settings(SLAConfig(topk=0.01, dense_steps=[0]), source).dense_steps == (0, -1)
    assert request_form.trained_settings(SLAConfig(topk=0.01, dense_steps=[0, 1]), source).dense_steps == (0, 1)
    *_, dense = request_form._shown(SAMPLE, saved(dense_steps=list(range(12))))
    assert (dense.maximum, dense.value) == (12, 12)
