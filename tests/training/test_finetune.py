import json
import logging

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import SIZES
from safetensors.torch import load_file, save_file

from diffusers_sla import (
    SLAConfig,
    SLAConfigError,
    SLADataError,
    SLAStateNotFoundError,
    SLATrainingError,
    SLAUnsupportedError,
    load_sla_weights,
    sla_layers,
    sla_parameters,
)
from diffusers_sla.cli import main
from diffusers_sla.lora import add_lora
from diffusers_sla.state import read_state
from diffusers_sla.training import checkpoint, prepare
from diffusers_sla.training import finetune as loop
from diffusers_sla.training.finetune import finetune
from diffusers_sla.training.settings import FinetuneSettings

CONFIG = SLAConfig(topk=0.25, blkq=16, blkk=16)
TARGETS = FinetuneSettings.__dataclass_fields__["lora_target_modules"].default


@pytest.fixture
def settings(tmp_path, saved_pipeline, photos, videos):
    def make(name="dit", out="out", **values):
        sizes = {"guidance_scale": 1.0, **SIZES[name]}
        data = videos if "num_frames" in SIZES[name] else photos
        values = {"data": data, "caption_column": "label" if name == "dit" else "text"} | sizes | values
        if values.get("attention_mechanism") != "diffusers":
            values.setdefault("sla_config", CONFIG)
        return FinetuneSettings(
            model=saved_pipeline(name), output_dir=tmp_path / out, cpu=True, sampling_steps=2,
            **{"max_train_steps": 2, "report_to": "none"} | values,
        )  # fmt: skip

    return make


def tensors(folder):
    """Every weight in a result or checkpoint, by file and name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.relative_to(folder).parts[0].startswith("checkpoint"):
            continue
        found |= {f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.mark.parametrize(
    ("name", "train", "values"),
    [
        ("dit", "full", {"train_batch_size": 2, "gradient_accumulation_steps": 2, "proportion_empty_prompts": 0.5}),
        ("dit", "lora", {"objective": "distill", "train_batch_size": 2}),
        ("sd", "lora", {"train_batch_size": 2}),
        ("flux", "lora", {"train_batch_size": 2, "gradient_checkpointing": True}),
        ("flux", "projection", {"objective": "distill"}),
        ("wan", "full", {}),
        ("wan", "lora", {"objective": "distill", "data": None, "prompts": ("a red cat", "a dog")}),
    ],
)
def test_what_it_writes_is_what_anyone_can_load(settings, name, train, values):
    result = finetune(settings(name, train=train, **values))
    assert result.step == 2
    assert result.loss > 0
    out, component = result.folder, "unet" if name == "sd" else "transformer"
    pipe = DiffusionPipeline.from_pretrained(settings(name).model)
    before = {key: tensor.clone() for key, tensor in getattr(pipe, component).state_dict().items()}
    if train == "full":
        model = type(getattr(pipe, component)).from_pretrained(out, subfolder=component)
        setattr(pipe, component, model)
        assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        stored = load_file(out / component / "diffusion_pytorch_model.safetensors")
        assert stored.keys() == before.keys()  # nothing of SLA's among them
    elif train == "lora":
        add_lora(pipe, out)
        after = getattr(pipe, component).state_dict()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed
        assert all(key.endswith(tuple(f"{target}.weight" for target in TARGETS)) for key in changed)
        if name != "dit":  # its pipeline has no load_lora_weights
            other = DiffusionPipeline.from_pretrained(settings(name).model)
            other.load_lora_weights(out)
            other.fuse_lora()
            fused = {
                key.replace(".base_layer", ""): tensor
                for key, tensor in getattr(other, component).state_dict().items()
            }
            for key in before:
                torch.testing.assert_close(after[key], fused[key])
    load_sla_weights(pipe, out)
    layers = sla_layers(pipe)
    assert all(layer.config == CONFIG for layer in layers.values())
    assert all(parameter.any() for parameter in sla_parameters(pipe))
    assert json.loads((out / "training.json").read_text())["step"] == 2
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dit", {"train": "full", "use_ema": True, "lr_scheduler": "cosine", "train_batch_size": 2}),
        ("sd", {"train": "lora", "gradient_accumulation_steps": 2, "proportion_empty_prompts": 0.5}),
        ("wan", {"train": "projection", "objective": "distill", "data": None, "prompts": ("a", "red", "cat")}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(settings, name, values):
    values = {"checkpointing_steps": 3, "max_train_steps": 5} | values
    through = finetune(settings(name, "through", **values))

    real = loop._Run._step

    def interrupted(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(self, step)

    loop._Run._step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(settings(name, "resumed", **values))
    finally:
        loop._Run._step = real
    resumed = finetune(settings(name, "resumed", resume="latest", **values))
    assert (through.resumed_from, resumed.resumed_from) == (0, 3)
    ours, theirs = tensors(through.folder), tensors(resumed.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint = tensors(through.folder / "checkpoint-3")
    assert any(not torch.equal(checkpoint[key], ours[key]) for key in checkpoint)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart", "ltx", "cogvideox"])
def test_other_pipelines_need_no_code_of_their_own(settings, name):
    distill = {"objective": "distill", "data": None, "prompts": ("a red cat",)}
    for out, values in (("data", {"train_batch_size": 2}), ("prompts", distill)):
        out = finetune(settings(name, out, train="projection", max_train_steps=1, **values)).folder
        assert all(tensor.any() for layer in read_state(out).layers.values() for tensor in layer.values())


@pytest.mark.parametrize("train", ["projection", "lora", "full"])
def test_half_precision_leaves_what_is_trained_in_float32(settings, train):
    out = finetune(settings("flux", train=train, mixed_precision="bf16", gradient_checkpointing=True)).folder
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}


def test_micro_steps_are_counted_over_the_whole_run(settings, monkeypatch):
    real = prepare.batches
    asked = []

    def batches(*args):
        made = real(*args)

        def batch(micro_step):
            asked.append(micro_step)
            return made(micro_step)

        return batch

    monkeypatch.setattr(prepare, "batches", batches)
    finetune(settings(gradient_accumulation_steps=2))
    finetune(settings(gradient_accumulation_steps=2, max_train_steps=3, resume="latest"))
    assert asked == [0, 1, 2, 3, 4, 5]


def test_the_average_becomes_the_result_and_the_checkpoint_goes_on(settings):
    out = finetune(settings(train="projection", use_ema=True, ema_decay=0.5)).folder
    result, checkpoint = tensors(out), tensors(out / "checkpoint-2")
    assert result.keys() == checkpoint.keys()
    assert not all(torch.equal(result[key], checkpoint[key]) for key in result)


def test_the_models_own_attention_can_be_trained_to_compare(settings):
    out = finetune(settings(attention_mechanism="diffusers", train="full")).folder
    assert not list(out.glob("sla_attention*"))
    assert (out / "transformer" / "config.json").is_file()


def test_projections_can_start_from_a_state_file(settings, caplog):
    first = finetune(settings(train="projection")).folder
    second = finetune(
        settings(out="b", train="projection", sla_weights=str(first), projection_learning_rate=1e-12)
    ).folder
    third = finetune(settings(out="c", sla_config=None, sla_weights=str(first), max_train_steps=1)).folder
    fourth = finetune(settings(out="d", sla_config=SLAConfig(topk=0.5), sla_weights=str(first))).folder
    fifth = finetune(settings(out="e", sla_config='{"topk": 0.5}', sla_weights=str(first))).folder
    assert [SLAConfig.parse(read_state(folder).settings) for folder in (third, fourth, fifth)] == [
        CONFIG, SLAConfig(topk=0.5), SLAConfig(topk=0.5, blkq=16, blkk=16),
    ]  # fmt: skip
    assert f"sla_config replaces settings of {first}: topk is 0.25 in the file and 0.5 here" in caplog.messages
    assert json.loads((fifth / "training.json").read_text())["settings"]["sla_config"]["blkq"] == 16
    ours, theirs = read_state(first).layers, read_state(second).layers
    for layer in ours:
        for name, tensor in ours[layer].items():
            torch.testing.assert_close(tensor, theirs[layer][name])


def test_validation_shows_dense_beside_sla_and_changes_nothing(settings):
    values = {"train": "full", "report_to": "tensorboard"}
    shown = finetune(settings(out="a", validation_prompts=("cat", "dog"), validation_steps=1, **values)).folder
    plain = finetune(settings(out="b", **values)).folder
    ours, theirs = tensors(shown), tensors(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    sheets = sorted((shown / "validation").iterdir())
    assert [path.name for path in sheets] == ["step-000001.png", "step-000002.png"]
    sheet = Image.open(sheets[1])
    assert sheet.size == (64, 64)  # two columns, two rows of 32 x 32
    assert sheet.crop((0, 0, 32, 64)).tobytes() != sheet.crop((32, 0, 64, 64)).tobytes()
    assert list((shown / "logs").rglob("events.*"))


def test_steps_that_stay_dense_in_sampling_train_sla_all_the_same(settings):
    config = SLAConfig(topk=0.25, blkq=16, blkk=16, dense_steps=(0, -1))
    out = finetune(settings(train="projection", sla_config=config)).folder
    state = read_state(out)
    assert list(state.settings["dense_steps"]) == [0, -1]
    assert all(tensor.any() for layer in state.layers.values() for tensor in layer.values())


def test_unreadable_files_are_named_and_counted(settings, tmp_path, photos, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "bad.png").write_text("no image")
    lines = [json.dumps({"file_name": name, "label": "cat"}) for name in ("0.png", "bad.png", "1.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        finetune(settings(data=folder))
    assert "bad.png: cannot identify image file" in caplog.text
    assert "skipped 1 of 3 files" in caplog.text
    (folder / "metadata.jsonl").write_text(lines[1])
    with pytest.raises(SLADataError, match="none of the 1 files"):
        finetune(settings(out="none", data=folder))


def test_an_empty_folder_stops_before_a_model_is_loaded(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    values = settings(data=tmp_path / "empty").to_dict() | {"model": "there/is-no-such-model"}
    values |= {"output_dir": tmp_path / "out", "data": tmp_path / "empty", "sla_config": CONFIG}
    with pytest.raises(SLADataError, match="has no file to train on"):
        finetune(FinetuneSettings(**values))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_checkpoint(settings, monkeypatch):
    real = loop.denoising_loss
    calls = []

    def poisoned(output, target):
        calls.append(1)
        return real(output, target) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "denoising_loss", poisoned)
    out = settings().output_dir
    with pytest.raises(SLATrainingError, match=r"loss is no longer finite at step 4 .*checkpoint-3$"):
        finetune(settings(max_train_steps=9, checkpointing_steps=3))
    good = read_state(out / "checkpoint-3")
    assert all(tensor.isfinite().all() for layer in good.layers.values() for tensor in layer.values())
    monkeypatch.setattr(loop, "denoising_loss", real)
    assert finetune(settings(max_train_steps=4, resume="latest")).resumed_from == 3


@pytest.mark.parametrize(
    ("broken", "failure"),
    [
        ("torch", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
        ("state", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_costs_neither_the_last_checkpoint_nor_the_run(settings, monkeypatch, caplog, broken, failure):
    out = settings().output_dir
    owner, name = (torch, "save") if broken == "torch" else (checkpoint, "write_state")
    real = getattr(owner, name)
    saves = []

    def full(*args, **kwargs):
        if "partial-4" in str(args):
            saves.append(args)
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with caplog.at_level(logging.ERROR):
        result = finetune(settings(max_train_steps=6, checkpointing_steps=2))
    assert saves
    assert "checkpoint-4 could not be saved" in caplog.text
    assert f"the last good checkpoint: {out / 'checkpoint-2'}" in caplog.text
    assert result.step == 6
    assert sorted(path.name for path in out.glob("*-*")) == ["checkpoint-2", "checkpoint-6"]


def test_what_is_no_full_disk_is_not_swallowed(settings, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checkpoint, "write_state", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        finetune(settings())


def test_old_checkpoints_go_and_the_newest_is_found(settings):
    out = finetune(settings(max_train_steps=12, checkpointing_steps=3, checkpoints_total_limit=2)).folder
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    resumed = finetune(settings(max_train_steps=13, resume="latest"))
    assert resumed.resumed_from == 12
    assert finetune(settings(max_train_steps=13, resume=str(out / "checkpoint-12"))).resumed_from == 12


def test_a_folder_with_another_run_is_not_written_over(settings):
    finetune(settings(max_train_steps=1))
    with pytest.raises(SLADataError, match="holds another run: go on with it by --resume"):
        finetune(settings(train="projection", max_train_steps=1))
    assert finetune(settings(max_train_steps=2, resume="latest")).resumed_from == 1


def test_a_lora_beside_the_first_projections_is_named(settings, caplog):
    first = finetune(settings(out="first", train="lora", max_train_steps=1)).folder
    assert (first / "pytorch_lora_weights.safetensors").stat().st_mode & 0o777 == 0o644
    finetune(settings(out="second", train="projection", sla_weights=str(first), max_train_steps=1))
    assert "without the LoRA beside them, pytorch_lora_weights.safetensors" in caplog.text


def test_what_cannot_be_resumed_says_why(settings, tmp_path):
    out = finetune(settings()).folder
    with pytest.raises(SLATrainingError, match="train was 'full' and is 'lora'; seed was 0 and is 1"):
        finetune(settings(train="lora", seed=1, resume="latest"))
    with pytest.raises(
        SLATrainingError, match=rf"^{out}/checkpoint-2 cannot .* topk of sla_config was 0\.25 and is 0\.3\."
    ):
        finetune(settings(sla_config=SLAConfig(topk=0.3, blkq=16, blkk=16), resume="latest"))
    for path in (out / "checkpoint-2").glob("sla_attention.*"):
        path.unlink()
    with pytest.raises(SLAStateNotFoundError, match="as little as one step"):
        finetune(settings(max_train_steps=3, resume="latest"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": "some"}, "train must be one of projection, lora, full, got 'some'"),
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"data": None}, "objective 'diffusion' needs data"),
        ({"data": None, "objective": "distill"}, "needs data or prompts"),
        ({"prompts": ("a",)}, "data and prompts exclude each other"),
        ({"attention_mechanism": "diffusers", "train": "projection"}, "has no projection"),
        ({"attention_mechanism": "diffusers", "sla_config": CONFIG}, "takes neither sla_config nor sla_weights"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, values, message):
    with pytest.raises(SLAConfigError, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"resume": "nosuch"}, SLADataError, r"^nosuch is no checkpoint .* no training\.json"),
        ({"sla_weights": "nosuch"}, SLAStateNotFoundError, "there is no file or folder 'nosuch'"),
        ({"sla_config": {"topk": 2}}, SLAConfigError, r"topk must be a number in \(0, 1\], got 2"),
    ],
)
def test_what_is_not_there_is_missed_before_a_model_is_loaded(settings, tmp_path, monkeypatch, values, error, message):
    monkeypatch.setattr(prepare, "load", None)
    with pytest.raises(error, match=message):
        finetune(settings(**values))
    assert not (tmp_path / "out").exists()


def test_what_the_pipeline_lacks_is_named(settings, tmp_path):
    with pytest.raises(SLAUnsupportedError, match="component must be one of transformer, got 'unet'"):
        finetune(settings(component="unet"))
    with pytest.raises(SLAConfigError, match="lora_target_modules nothing, q: DiTTransformer2DModel has no layer"):
        finetune(settings(train="lora", lora_target_modules=("nothing", "q")))
    assert not (tmp_path / "out" / "cache").exists()
    with pytest.raises(SLAConfigError, match="DiTPipeline takes no height"):
        finetune(settings(height=64, width=64))


def test_latents_of_another_shape_stop_the_run(settings, tmp_path):
    save_file({"latents": torch.zeros(4, 8, 8)}, tmp_path / "a.safetensors")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.safetensors", "label": "cat"}')
    with pytest.raises(SLAUnsupportedError, match=r"samples of shape \(4, 16, 16\); latents of shape \(4, 8, 8\)"):
        finetune(settings(data=tmp_path))
    save_file({"latents": torch.zeros(4, 16, 16)}, tmp_path / "a.safetensors")
    assert finetune(settings(data=tmp_path)).step == 2


def test_the_command_takes_the_names_people_know(saved_pipeline, videos, tmp_path):
    arguments = [
        "finetune", "--model", saved_pipeline("wan"), "--data", videos, "--out", tmp_path / "out", "--cpu",
        "--attention_mechanism", "sla", "--sla_config", "{'topk': 0.25, 'blkq': 16, 'blkk': 16}", "--train", "lora",
        "--height", 64, "--width", 64, "--num-frames", 5, "--max-train-steps", 1, "--report_to", "none",
    ]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "step 1, loss" in result.output
    assert read_state(tmp_path / "out").settings["topk"] == 0.25
    result = CliRunner().invoke(main, ["finetune", "--model", "x", "--out", str(tmp_path), "--data", "/no/folder"])
    assert result.exit_code == 1
    assert "there is no folder /no/folder" in result.output
