import pytest
import torch
from pipelines import tiny_dit, write_lora
from safetensors.torch import load_file, save_file

from diffusers_sla import SLAStateFormatError, SLAStateMismatchError, SLAStateNotFoundError, apply_sla
from diffusers_sla.lora import LORA_NAME, add_lora, lora_beside

LAYER = "transformer.transformer_blocks.0.attn1.to_q"


def test_the_product_is_added_and_the_same_weights_come_back(tmp_path):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path, rank=3)
    before = dict(pipe.transformer.named_parameters())
    values = {name: parameter.data.clone() for name, parameter in before.items()}
    places = {name: parameter.data_ptr() for name, parameter in before.items()}
    remove = add_lora(pipe, tmp_path)
    lora = load_file(tmp_path / LORA_NAME)
    assert len(lora) == 2 * 2
    for name, parameter in before.items():
        key = f"transformer.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            expected = values[name] + lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
            assert (parameter - values[name]).norm() > 1
            torch.testing.assert_close(parameter.data, expected)
        else:
            assert torch.equal(parameter, values[name])
    remove()
    after = dict(pipe.transformer.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in values)
    assert {name: parameter.data_ptr() for name, parameter in after.items()} == places


def test_half_precision_weights_stay_so_and_the_sum_is_rounded_once(tmp_path):
    model = apply_sla(tiny_dit().transformer).to(torch.bfloat16)  # a bare model, SLA installed
    write_lora(model, tmp_path, rank=2)
    weight = model.get_parameter(LAYER.partition(".")[2] + ".weight")
    before = weight.data
    add_lora(model, tmp_path / LORA_NAME)
    lora = load_file(tmp_path / LORA_NAME)
    update = lora[f"{LAYER}.lora_B.weight"] @ lora[f"{LAYER}.lora_A.weight"]
    assert torch.equal(weight.data, (before.float() + update).bfloat16())


def test_it_is_taken_out_where_it_was_put_in(tmp_path):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path)
    before = pipe.transformer.get_parameter(LAYER.partition(".")[2] + ".weight").clone()
    remove = add_lora(pipe, tmp_path)
    pipe.transformer.to(torch.float64)
    with pytest.raises(SLAStateMismatchError, match=r"were torch\.float32 on cpu when .* and are torch\.float64"):
        remove()
    pipe.transformer.to(torch.float32)
    remove()
    assert torch.equal(pipe.transformer.get_parameter(LAYER.partition(".")[2] + ".weight"), before)


def changed(**changes):
    """What takes the place of the file's tensors: None takes one out."""

    def change(tensors):
        for name, value in changes.items():
            key = f"{LAYER}.{name}.weight" if name in ("lora_A", "lora_B") else name
            tensors[key] = value
        return {key: value for key, value in tensors.items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed(lora_B=None), SLAStateFormatError, f"has only one of lora_A and lora_B of {LAYER}"),
        (changed(**{f"{LAYER}.alpha": torch.ones(1)}), SLAStateFormatError, "to_q.alpha', which no LoRA of finetune"),
        (changed(lora_A=torch.ones(3, 9)), SLAStateMismatchError, r"has lora_A \[3, 9\] and lora_B \[16, 3\]"),
        (changed(lora_A=torch.ones(2, 16)), SLAStateMismatchError, r"16 outputs of 16 inputs"),
        (changed(lora_A=torch.tensor(1.0)), SLAStateMismatchError, r"has lora_A \[\]"),
        (changed(lora_A=torch.full((3, 16), torch.nan)), SLAStateFormatError, "not finite"),
        (changed(lora_A=torch.ones(3, 16, dtype=torch.int32)), SLAStateFormatError, "not floating point"),
        (changed(lora_A=torch.ones(0, 16), lora_B=torch.ones(16, 0)), SLAStateFormatError, "is empty"),
        (lambda tensors: {}, SLAStateFormatError, "holds no LoRA"),
        (
            lambda tensors: {key.replace("blocks.1", "blocks.7"): value for key, value in tensors.items()},
            SLAStateMismatchError, r"has transformer\.transformer_blocks\.7\.attn1\.to_q, which the model has not",
        ),
        (
            lambda tensors: {key.replace("transformer.", "unet.", 1): value for key, value in tensors.items()},
            SLAStateMismatchError, "which the model has not",
        ),
        (
            lambda tensors: {key.replace(".to_q", ""): value for key, value in tensors.items()},
            SLAStateMismatchError, "the layer is a Attention",
        ),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, change, error, message):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path, rank=3)
    save_file(change(load_file(tmp_path / LORA_NAME)), tmp_path / LORA_NAME)
    places = [parameter.data_ptr() for parameter in pipe.transformer.parameters()]
    with pytest.raises(error, match=message):
        add_lora(pipe, tmp_path)
    assert [parameter.data_ptr() for parameter in pipe.transformer.parameters()] == places


def test_settings_of_others_are_not_passed_over(tmp_path):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path, rank=3)
    settings = {"format": "pt", "lora_adapter_metadata": '{"transformer.lora_alpha": 6}'}
    save_file(load_file(tmp_path / LORA_NAME), tmp_path / LORA_NAME, metadata=settings)
    with pytest.raises(SLAStateFormatError, match="'lora_adapter_metadata', which no LoRA of finetune has"):
        add_lora(pipe, tmp_path)


def test_a_lora_that_is_not_there(tmp_path):
    with pytest.raises(SLAStateNotFoundError, match=LORA_NAME):
        add_lora(tiny_dit(), tmp_path)


def test_what_lies_beside_a_state(tmp_path):
    assert lora_beside(tmp_path) is None
    write_lora(tiny_dit(), tmp_path)
    assert lora_beside(tmp_path) == lora_beside(str(tmp_path)) == tmp_path / LORA_NAME
    for none in (tmp_path / LORA_NAME, "you/repo", {"state": {}}, None):
        assert lora_beside(none) is None
