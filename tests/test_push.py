import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download
from models import make, output
from pipelines import make_pipeline, tiny_dit
from safetensors.torch import save_file

from diffusers_sla import (
    SLAConfig,
    SLAConfigError,
    SLAHubError,
    SLAStateError,
    apply_sla,
    load_sla_weights,
    push_sla_to_hub,
    remove_sla,
    save_sla_weights,
    sla_parameters,
)
from diffusers_sla.cli import main
from diffusers_sla.push import plan_push
from diffusers_sla.state import read_state, write_state

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


@pytest.fixture(scope="module")
def trained():
    model, _ = make("wan")
    apply_sla(model, SPARSE)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def folder(trained, tmp_path):
    meta = {
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "speed": [{"GPU": "H100", "dense ms": 11.61, "SLA ms": 1.2}],
        "quality": [{"run": "SLA", "PSNR": 31.2}, {"run": "without SLA", "PSNR": 24.0}],
        "training": {"steps": 400, "learning rate": 1e-4},
    }
    return save_sla_weights(trained, tmp_path / "out", meta=meta)


def tree(hub, repo_id, revision="main"):
    return set(hub.repos["model", repo_id].resolve(revision)[1].tree) - {".gitattributes"}


def text(hub, repo_id, name):
    return hub.repos["model", repo_id].resolve("main")[1].tree[name].data.decode()


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def component(folder, trained):
    """The model itself beside its state, without the processors' weights in its checkpoint."""
    plain, _ = make("wan")
    plain.save_pretrained(folder / "transformer")


def lora(folder, layer="transformer.blocks.0.attn1", width=24):
    tensors = {f"{layer}.to_q.lora_A.weight": torch.zeros(4, 24), f"{layer}.to_q.lora_B.weight": torch.zeros(width, 4)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


STATE = {"sla_attention.pt", "sla_attention.safetensors", "sla_config.json", "README.md"}


def test_one_commit_holds_everything(hub, transport, repo_id, folder, trained):
    component(folder, trained)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pushed = push_sla_to_hub(folder, repo_id)
    model_files = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert tree(hub, repo_id) == STATE | model_files == set(pushed.files)
    assert len(hub.repos["model", repo_id].history()) == 2
    assert json.loads(text(hub, repo_id, "sla_config.json"))["settings"] == SPARSE.to_dict()
    assert push_sla_to_hub(folder, repo_id).changed is False
    assert len(hub.repos["model", repo_id].history()) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_lines_bring_back_what_was_trained(hub, repo_id, folder, trained):
    from diffusers import WanTransformer3DModel

    component(folder, trained)
    push_sla_to_hub(folder, repo_id)
    model = WanTransformer3DModel.from_pretrained(repo_id, subfolder="transformer")
    load_sla_weights(model, repo_id)
    assert all(torch.equal(a, b) for a, b in zip(sla_parameters(model), sla_parameters(trained), strict=True))


def test_a_model_in_memory_can_be_pushed(hub, repo_id, trained):
    push_sla_to_hub(trained, repo_id)
    assert tree(hub, repo_id) == STATE
    assert push_sla_to_hub(trained, repo_id).changed is False  # equal states are equal bytes


@pytest.mark.parametrize("kept", ["sla_attention.pt", "sla_attention.safetensors"])
def test_the_twin_that_is_missing_is_made_and_not_kept_here(hub, repo_id, folder, kept):
    for path in folder.glob("sla_attention.*"):
        if path.name != kept:
            path.unlink()
    push_sla_to_hub(folder, repo_id)
    assert tree(hub, repo_id) == STATE
    assert os.listdir(folder) == [kept]


def test_a_lora_and_named_weights_go_along_and_the_rest_is_told(hub, repo_id, folder):
    lora(folder)
    (folder / "samples").mkdir()
    (folder / "samples" / "a.txt").write_text("a")
    (folder / "train.log").write_text("secret")
    (folder / ".cache").mkdir()
    result = run("push", folder, "--repo", repo_id, "--weights", folder / "samples", "--license", "apache-2.0")
    assert (result.exit_code, result.stderr) == (0, "left out: train.log (--weights train.log takes it along)\n")
    assert tree(hub, repo_id) == STATE | {"pytorch_lora_weights.safetensors", "samples/a.txt"}
    card = ModelCard(text(hub, repo_id, "README.md"))
    assert card.data.tags == ["diffusers-sla", "sparse-linear-attention", "sparse-attention", "lora"]
    assert 'pipe.load_lora_weights("' + repo_id + '", weight_name="pytorch_lora_weights.safetensors")' in card.text


def test_a_pipeline_is_pushed_with_its_parts(hub, repo_id, folder, trained):
    component(folder, trained)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], "../x": ["a", "b"],
             "vae": ["diffusers", "AutoencoderKLWan"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    push_sla_to_hub(folder, repo_id)
    assert {"model_index.json", "vae/config.json", "transformer/config.json"} < tree(hub, repo_id)
    assert f'DiffusionPipeline.from_pretrained("{repo_id}"' in text(hub, repo_id, "README.md")


def test_variants_have_folders_and_sections_of_their_own(hub, repo_id, folder):
    push_sla_to_hub(folder, repo_id, subfolder="topk-0.25")
    push_sla_to_hub(folder, repo_id, subfolder="topk-0.05")
    push_sla_to_hub(folder, repo_id, subfolder="topk-0.05")
    names = STATE - {"README.md"}
    expected = {f"topk-{topk}/{name}" for topk in ("0.25", "0.05") for name in names} | {"README.md"}
    assert tree(hub, repo_id) == expected
    card = text(hub, repo_id, "README.md")
    assert card.count("load_sla_weights(pipe") == 2
    assert f'load_sla_weights(pipe, "{repo_id}", subfolder="topk-0.05")' in card
    for bad in ("../up", "/root", "a//b", ".hidden", "a/../b"):
        with pytest.raises(SLAConfigError, match="subfolder must be a path"):
            plan_push(folder, repo_id, subfolder=bad)


def evil(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    return Evil()


def no_state(folder):
    for path in folder.glob("sla_attention.*"):
        path.unlink()


def other_state(folder):
    state = read_state(folder)
    next(iter(state.layers.values()))["proj_l.bias"] += 1
    write_state(state, folder / "sla_attention.pt")


def cut_state(folder):
    path = folder / "sla_attention.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def bad_settings(folder):
    state = read_state(folder)
    state.settings["topk"] = 7
    for name in ("sla_attention.pt", "sla_attention.safetensors"):
        write_state(state, folder / name)


def other_model(folder):
    make("flux")[0].save_pretrained(folder / "transformer")


def other_lora(folder):
    lora(folder, "transformer.blocks.7.attn1")


def narrow_lora(folder):
    lora(folder, width=25)


def unet_lora(folder):
    lora(folder, "unet.mid_block.attentions.0.transformer_blocks.0.attn1")


def cut_weights(folder):
    make("wan")[0].save_pretrained(folder / "transformer")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_vae(folder):
    (folder / "transformer").mkdir()
    index = {
        "_class_name": ["x", "Y"],
        "transformer": ["diffusers", "A"],
        "vae": ["diffusers", "B"],
        "t": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def pickled_code(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "scheduler.bin").write_bytes(pickle.dumps(evil(folder)))


def zipped_code(folder):
    torch.save({"a": evil(folder)}, folder / "model.pt")


def hidden_name(folder):
    """A global whose name is put on the stack in a way that reading the opcodes cannot follow."""
    code = b"\x80\x04\x8c\x02os\x8c\x06system0\x8c\x05mkdir\x93."
    (folder / "x.pkl").write_bytes(code)


def link_outside(folder):
    (folder.parent / "secret.json").write_text("{}")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").symlink_to(folder.parent / "secret.json")


def version_1(folder):
    no_state(folder)
    tensors = {"proj_l.weight": torch.zeros(12, 12), "proj_l.bias": torch.zeros(12)}
    torch.save({"settings": {}, "state": {"12:bf16": tensors}, "version": 1}, folder / "sla_attention.pt")


def bad_readme(folder):
    (folder / "README.md").write_text("---\n: [\n---\n")


def binary_readme(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")


def bad_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_state, r"out has no sla_attention\.pt"),
        (other_state, r"sla_attention\.safetensors and sla_attention\.pt in .* hold different states"),
        (cut_state, r"sla_attention\.safetensors is damaged"),
        (bad_settings, r"sla_attention\.safetensors: the file's settings are wrong: topk"),
        (other_model, r"sla_attention\.pt does not fit the model beside it: the file lacks transformer\."),
        (other_lora, r"pytorch_lora_weights\.safetensors has transformer\.blocks\.7\.attn1"),
        (narrow_lora, r"is 25 wide, the state has head size 12"),
        (unet_lora, r"pytorch_lora_weights\.safetensors is for a unet, the state beside it for a transformer"),
        (cut_weights, r"diffusion_pytorch_model\.safetensors is damaged"),
        (no_vae, r"model_index\.json names vae, and there is no such folder beside it"),
        (pickled_code, r"deep/scheduler\.bin is a pickle that holds code \(posix\.mkdir\)"),
        (zipped_code, r"model\.pt is a pickle that holds code \(posix\.mkdir\)"),
        (hidden_name, r"x\.pkl is a pickle that holds code \(\?\.\?\)"),
        (link_outside, r"transformer/config\.json is a link to .*secret\.json, outside of the folder"),
        (version_1, r"is a version 1 file, which says nothing of the layers"),
        (bad_readme, r"front matter of the README\.md that is there is not valid"),
        (binary_readme, r"README\.md is not text in UTF-8"),
        (bad_config, r"config\.json is not JSON"),
    ],
)
def test_what_is_wrong_is_refused_before_the_hub_is_asked(hub, repo_id, folder, spoil, message):
    spoil(folder)
    with pytest.raises((SLAStateError, SLAHubError, ValueError), match=message):
        push_sla_to_hub(folder, repo_id)
    assert hub.requests == []
    assert not (folder / "ran").exists()
    result = run("push", folder, "--repo", repo_id, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("wrong", ["wan", "a//b", "you/x/y", "bad id/x", ""])
def test_a_wrong_repository_is_refused_before_the_hub_is_asked(hub, folder, wrong):
    result = run("push", folder, "--repo", wrong, "--dry-run")
    assert (result.exit_code, hub.requests) == (1, [])
    assert "is not a repository id such as 'user/name'" in result.stderr
    with pytest.raises(SLAHubError, match="not a repository id"):
        push_sla_to_hub(folder, wrong)


@pytest.mark.parametrize(
    "name", ["README.md", "sla_config.json", "sla_attention.pt", "pytorch_lora_weights.safetensors"]
)
def test_weights_take_no_other_files_place(repo_id, folder, tmp_path, name):
    lora(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("x")
    with pytest.raises(SLAHubError, match=f"other/{name}, given as weights, would take the place of"):
        plan_push(folder, repo_id, weights=[other / name])
    plan_push(folder, repo_id, weights=[folder / "sla_attention.pt"])


def test_a_lora_given_as_weights_is_checked_and_in_the_card(repo_id, folder, tmp_path):
    lora(tmp_path)
    plan = plan_push(folder, repo_id, weights=[tmp_path / "pytorch_lora_weights.safetensors"])
    assert 'pipe.load_lora_weights("' in plan.render()
    lora(tmp_path, "transformer.blocks.7.attn1")
    with pytest.raises(SLAStateError, match="they are no pair"):
        plan_push(folder, repo_id, weights=[tmp_path / "pytorch_lora_weights.safetensors"])


def test_folders_without_a_name_keep_theirs(repo_id, folder, tmp_path, monkeypatch):
    more = tmp_path / "more" / "deep"
    more.mkdir(parents=True)
    (more / "a.json").write_text("{}")
    monkeypatch.chdir(more)
    assert "deep/a.json" in plan_push(folder, repo_id, weights=["."]).files
    assert "more/deep/a.json" in plan_push(folder, repo_id, weights=[".."]).files


def test_pickles_without_code_are_let_through(hub, repo_id, folder):
    import numpy

    torch.save({"a": torch.ones(2), "b": torch.device("cpu")}, folder / "optimizer.bin")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps({"numpy": numpy.random.default_rng(0).bytes(4)}))
    (folder / "array.pkl").write_bytes(pickle.dumps(numpy.arange(3)))
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    plan_push(folder, repo_id)


def test_a_readme_keeps_what_somebody_wrote(hub, repo_id, folder):
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\npipeline_tag: image-to-video\n---\n\n# My title\n\nMy text.\n"
    )
    push_sla_to_hub(folder, repo_id)
    first = text(hub, repo_id, "README.md")
    card = ModelCard(first)
    assert (card.data.license, card.data.pipeline_tag, card.data.tags[0]) == ("mit", "image-to-video", "mine")
    assert card.text.strip().startswith("# My title\n\nMy text.\n\n<!-- diffusers-sla: begin -->")
    # Somebody edits it on the Hub; our next push changes the section only.
    repo = hub.repos["model", repo_id]
    edited = first.replace("My text.", "Their text.") + "\nBelow.\n"
    from hub_repos import Entry

    commit = repo.resolve("main")[1]
    repo.commit("refs/heads/main", commit.tree | {"README.md": Entry(len(edited), edited.encode())}, "Edit", "bob")
    other_state(folder)
    shutil.copy(folder / "sla_attention.pt", folder / "x.pt")
    write_state(read_state(folder / "x.pt"), folder / "sla_attention.safetensors")
    assert "that of the folder was not used" in run("push", folder, "--repo", repo_id).stderr
    after = text(hub, repo_id, "README.md")
    assert "Their text." in after
    assert after.rstrip().endswith("Below.")
    assert after.count("diffusers-sla: begin") == 1
    assert after != edited


def test_the_card_previews_what_a_push_writes(hub, repo_id, folder):
    result = run("push", folder, "--repo", repo_id, "--card", "--license", "apache-2.0")
    assert result.exit_code == 0
    assert hub.requests == []
    push_sla_to_hub(folder, repo_id, license="apache-2.0")
    assert result.stdout == text(hub, repo_id, "README.md")


def test_dry_run_asks_nobody_and_says_what_it_would_do(hub, repo_id, folder):
    result = run("push", folder, "--repo", repo_id, "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert set(found["files"]) == STATE
    assert found["files"]["sla_attention.pt"] == (folder / "sla_attention.pt").stat().st_size
    assert hub.requests == []


def test_the_command_tells_its_result_three_ways(hub, repo_id, folder):
    result = run("push", folder, "--repo", repo_id, "--private", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{hub.url}/{repo_id}/commit/")
    assert hub.repos["model", repo_id].private
    again = run("push", folder, "--repo", repo_id)
    assert again.stdout == f"unchanged: {hub.url}/{repo_id}\n"
    assert "the model card names no licence" in again.stderr
    assert "names no licence" not in run("push", folder, "--repo", repo_id, "--license", "mit").stderr
    assert "names no licence" not in run("push", folder, "--repo", repo_id).stderr
    told = json.loads(run("push", folder, "--repo", repo_id, "--json").stdout)
    assert (told["repo_id"], told["changed"]) == (repo_id, False)
    assert "hf_alice_token" not in result.output


def test_usage_errors_exit_2_and_known_ones_1(hub, folder):
    assert run("push", folder).exit_code == 2
    assert run("push", folder, "--repo", "a/b", "--no-such").exit_code == 2
    assert run("pull", "not-a-repo").exit_code == 2
    result = run("push", folder, "--repo", "acme2/x")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "the Hub does not let you do this" in result.stderr


def test_pull_prints_where_the_state_is(hub, repo_id, folder, tmp_path):
    push_sla_to_hub(folder, repo_id)
    result = run("pull", repo_id, "--local-dir", tmp_path / "here")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/here/sla_attention.safetensors\n")
    assert read_state(result.stdout.strip()).settings == SPARSE.to_dict()
    told = json.loads(run("pull", repo_id, "--weight-name", "sla_attention.pt", "--json").stdout)
    assert (told["settings"]["topk"], told["layers"]) == (0.25, 2)
    result = run("pull", repo_id, "--revision", "v9")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


def test_pull_refuses_what_is_no_state(hub, repo_id, tmp_path):
    from diffusers_sla.hub import push_files

    push_files(repo_id, lambda _: {"sla_attention.pt": pickle.dumps(evil(tmp_path))}, message="Add")
    result = run("pull", repo_id, "--local-dir", tmp_path / "here")
    assert result.exit_code == 1
    assert "sla_attention.pt is damaged" in result.stderr
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "ran").exists()


def test_without_sla_there_is_nothing_to_push(hub, repo_id):
    model, _ = make("wan")
    with pytest.raises(SLAStateError, match="there is no SLA on this model"):
        push_sla_to_hub(model, repo_id)
    remove_sla(model)


def projections(pipe):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sla_parameters(pipe):
            parameter.normal_(std=0.3)


def picture(pipe):
    generator = torch.Generator().manual_seed(3)
    return pipe([0], num_inference_steps=2, generator=generator, output_type="np").images


def test_a_pipeline_is_brought_back_by_two_lines(hub, transport, repo_id, tmp_path):
    pipe = tiny_dit()
    pipe.save_pretrained(tmp_path)
    apply_sla(pipe, SPARSE)
    projections(pipe)
    save_sla_weights(pipe, tmp_path)
    push_sla_to_hub(tmp_path, repo_id)

    again = DiffusionPipeline.from_pretrained(repo_id)
    load_sla_weights(again, repo_id)
    plan_push(snapshot_download(repo_id), repo_id)  # a folder of links into the cache
    again.set_progress_bar_config(disable=True)
    assert (picture(again) == picture(pipe)).all()


def test_a_lora_and_its_state_are_brought_back_from_one_repository(hub, repo_id, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = make_pipeline("wan")
    pipe.save_pretrained(tmp_path / "base")
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    apply_sla(pipe, SPARSE)
    projections(pipe)
    folder = save_sla_weights(pipe, tmp_path / "run")
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    push_sla_to_hub(folder, repo_id)
    assert tree(hub, repo_id) == STATE | {"pytorch_lora_weights.safetensors"}

    again = DiffusionPipeline.from_pretrained(tmp_path / "base")
    again.load_lora_weights(repo_id, weight_name="pytorch_lora_weights.safetensors")
    load_sla_weights(again, repo_id)
    _, inputs = make("wan")
    with torch.no_grad():
        torch.testing.assert_close(output(again.transformer, inputs), output(pipe.transformer, inputs))
