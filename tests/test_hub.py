import json
import os

import huggingface_hub
import pytest
import torch
from hub_repos import Entry
from huggingface_hub import HfApi
from models import make

from diffusers_sla import (
    SLAConfig,
    SLAHubError,
    SLAStateError,
    apply_sla,
    load_sla_weights,
    save_sla_weights,
    sla_parameters,
)
from diffusers_sla.hub import Remote, download, hub_status, is_repo_id, push_files, remote_files, remote_header


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the state of a trained model, and the model."""
    model, _ = make("wan")
    apply_sla(model, SLAConfig(topk=0.25, blkq=16, blkk=16))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.normal_(std=0.3)
    return save_sla_weights(model, tmp_path_factory.mktemp("saved")), model


def push(repo_id, saved, *names, **keywords):
    names = names or ("sla_attention.pt", "sla_attention.safetensors")
    return push_files(repo_id, lambda readme: {name: saved[0] / name for name in names}, message="Add", **keywords)


def tree(hub, repo_id, revision="main", type_="model"):
    return set(hub.repos[type_, repo_id].resolve(revision)[1].tree) - {".gitattributes"}


def same(model, saved):
    return all(torch.equal(a, b) for a, b in zip(sla_parameters(model), sla_parameters(saved[1]), strict=True))


def test_the_client_is_the_one_asked_for():
    assert huggingface_hub.__version__ == os.environ.get("EXPECT_HUB", huggingface_hub.__version__)


def test_is_repo_id(tmp_path, monkeypatch):
    assert all(is_repo_id(name) for name in ("user/repo", "a-b/c.d_e"))
    assert not any(
        is_repo_id(name) for name in ("repo", "./repo", "a/b/c", "a/b.pt", "a/x.safetensors", "a//b", "a/--")
    )
    (tmp_path / "user" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_repo_id("user/repo")


def test_a_pushed_state_is_loaded_from_its_repository(hub, transport, repo_id, saved):
    pushed = push(repo_id, saved)
    assert pushed.changed
    assert tree(hub, repo_id) == {"sla_attention.pt", "sla_attention.safetensors"}
    assert len(hub.repos["model", repo_id].history()) == 2
    model, _ = make("wan")
    assert load_sla_weights(model, repo_id) is model
    assert same(model, saved)
    assert f"HEAD /{repo_id}/resolve/main/sla_attention.pt 200" not in hub.requests  # the safetensors file is enough
    fresh, _ = make("wan")
    load_sla_weights(fresh, repo_id, weight_name="sla_attention.pt")
    assert same(fresh, saved)


def test_only_a_pt_file_is_found_too(hub, repo_id, saved):
    push(repo_id, saved, "sla_attention.pt")
    model, _ = make("wan")
    load_sla_weights(model, repo_id)
    assert same(model, saved)


def test_revisions_and_subfolders(hub, repo_id, saved, tmp_path):
    push(repo_id, saved, revision="fp8/v1")
    assert tree(hub, repo_id) == set()
    push_files(repo_id, lambda _: {"low/sla_attention.pt": saved[0] / "sla_attention.pt"}, message="Add")
    for keywords in ({"revision": "fp8/v1"}, {"subfolder": "low"}):
        model, _ = make("wan")
        load_sla_weights(model, repo_id, **keywords)
        assert same(model, saved)
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "x.pt").write_bytes((saved[0] / "sla_attention.pt").read_bytes())
    load_sla_weights(model, tmp_path, subfolder="low", weight_name="x.pt")
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        load_sla_weights(model, repo_id, revision="v9")
    with pytest.raises(
        OSError, match=r"a file named sla_attention.safetensors or sla_attention.pt in a folder high\."
    ):
        load_sla_weights(model, repo_id, subfolder="high")


def test_the_cache_serves_without_the_hub(hub, repo_id, saved, tmp_path):
    push(repo_id, saved)
    model, _ = make("wan")
    with pytest.raises(
        OSError, match=r"couldn't find it in the cached files .* sla_attention\.safetensors or sla_attention\.pt"
    ):
        load_sla_weights(model, repo_id, cache_dir=tmp_path, local_files_only=True)
    load_sla_weights(model, repo_id, cache_dir=tmp_path)
    hub.requests.clear()
    fresh, _ = make("wan")
    load_sla_weights(fresh, repo_id, cache_dir=tmp_path, local_files_only=True)
    assert hub.requests == []
    hub.fail(503, times=99)
    load_sla_weights(fresh, repo_id, cache_dir=tmp_path)
    assert same(fresh, saved)
    hub.heal()
    hub.requests.clear()
    load_sla_weights(fresh, repo_id, cache_dir=tmp_path, force_download=True)
    assert any("sla_attention.safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("alice/none", r"alice/none is not a local folder and is not a valid model identifier"),
        ("no-such-file.pt", r"there is no file or folder 'no-such-file\.pt', and it is not a repository"),
        ("a/b/c", r"there is no file or folder 'a/b/c'"),
    ],
)
def test_what_is_not_there_is_an_os_error(hub, source, message):
    with pytest.raises(OSError, match=message):
        load_sla_weights(make("wan")[0], source)


def test_a_repository_without_state_says_so(hub, repo_id):
    push_files(repo_id, lambda _: {"a.txt": b"a"}, message="Add")
    with pytest.raises(
        OSError, match=r"does not appear to have a file named sla_attention\.safetensors or sla_attention\.pt"
    ):
        load_sla_weights(make("wan")[0], repo_id)


def test_private_and_gated_repositories(hub, repo_id, saved, tmp_path):
    push(repo_id, saved, private=True)
    assert hub.repos["model", repo_id].private
    model, _ = make("wan")
    for token in (False, "hf_bob_token"):
        with pytest.raises(OSError, match="If this is a private repository, make sure to pass a token"):
            load_sla_weights(model, repo_id, token=token, cache_dir=tmp_path)
    load_sla_weights(model, repo_id, cache_dir=tmp_path / "alice")
    HfApi().update_repo_settings(repo_id, private=False, gated="auto")
    with pytest.raises(OSError, match=r"is a gated repository: ask for access at http://127"):
        load_sla_weights(model, repo_id, token="hf_bob_token", cache_dir=tmp_path / "bob")
    with pytest.raises(SLAHubError) as caught:
        load_sla_weights(model, repo_id, token="hf_nonsense", cache_dir=tmp_path / "nobody")
    assert "hf_nonsense" not in str(caught.value)


def test_a_remote_header_is_read_without_the_tensors(hub, repo_id, saved):
    push(repo_id, saved)
    hub.requests.clear()
    metadata, tensors = remote_header(Remote(repo_id), "sla_attention.safetensors")
    assert json.loads(metadata["diffusers_sla"])["settings"]["topk"] == 0.25
    assert tensors["transformer.blocks.0.attn1.proj_l.weight"] == ("F32", [12, 12])
    assert remote_files(Remote(repo_id)) == [".gitattributes", "sla_attention.pt", "sla_attention.safetensors"]


def test_the_same_again_is_no_commit(hub, transport, repo_id, saved):
    first = push(repo_id, saved)
    again = push(repo_id, saved)
    assert (again.changed, again.commit) == (False, first.commit)
    assert len(hub.repos["model", repo_id].history()) == 2


def test_a_pull_request_from_somebody_else(hub, transport, repo_id, saved):
    push(repo_id, saved, "sla_attention.pt")
    pushed = push(repo_id, saved, create_pr=True, token="hf_bob_token")
    assert pushed.pull_request.endswith(f"{repo_id}/discussions/1")
    assert tree(hub, repo_id) == {"sla_attention.pt"}
    assert tree(hub, repo_id, "refs/pr/1") == {"sla_attention.pt", "sla_attention.safetensors"}
    with pytest.raises(SLAHubError, match="the Hub does not let you do this"):
        push(repo_id, saved, token="hf_bob_token")


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_refusals_that_pass_are_tried_again(hub, repo_id, saved, status, caplog):
    for match in ("repos/create", "/api/models/", "validate-yaml", "preupload", "/commit/"):
        hub.fail(status, match=match)
    assert push(repo_id, saved).changed
    assert len(hub.repos["model", repo_id].history()) == 2
    assert f"the Hub answered {status}; trying again" in caplog.text


def test_the_hub_says_how_long_to_wait(hub, repo_id, saved, monkeypatch):
    waits = []
    monkeypatch.setattr("diffusers_sla.hub.time.sleep", waits.append)
    hub.fail(429, match="/commit/", headers={"Retry-After": "17"})
    push(repo_id, saved)
    assert waits == [17]


def test_a_commit_in_between_is_built_upon(hub, repo_id):
    seen = []

    def files(readme):
        seen.append(readme)
        if len(seen) == 1:  # somebody else is faster
            repo = hub.repos["model", repo_id]
            theirs = {**repo.resolve("main")[1].tree, "README.md": Entry(6, b"theirs")}
            repo.commit("refs/heads/main", theirs, "Faster", "bob")
        return {"README.md": f"{readme or ''} and ours".encode()}

    assert push_files(repo_id, files, message="Add").changed
    assert seen == [None, "theirs"]
    assert hub.repos["model", repo_id].resolve("main")[1].tree["README.md"].data == b"theirs and ours"


def test_a_lost_pull_request_is_not_opened_twice(hub, repo_id, saved):
    push_files(repo_id, lambda _: {"a.txt": b"a"}, message="Add")
    hub.cut("after", match="/commit/")
    with pytest.raises(SLAHubError, match=r"look whether .*/discussions has it"):
        push(repo_id, saved, create_pr=True)
    assert len(hub.repos["model", repo_id].discussions) == 1


def steps_of_a_push(hub, repo_id, saved):
    hub.requests.clear()
    push(repo_id, saved)
    steps = [request.rpartition(" ")[0].replace(repo_id, "ID") for request in hub.requests]
    return [request.removesuffix(" cut") for request in steps]


@pytest.mark.parametrize("cut", ["before", "after", "middle"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_push_cut_at_each_request_in_turn(hub, transport, repo_id, saved, cut, times):
    """Afterwards all of it is there or nothing, a second run completes it, and the files here are as they were."""
    before = {path.name: path.read_bytes() for path in saved[0].iterdir()}
    steps = steps_of_a_push(hub, repo_id, saved)
    assert len(steps) >= 5
    whole = {"sla_attention.pt", "sla_attention.safetensors"}
    for number in range(len(steps)):
        target = f"{repo_id}-{number}"
        hub.requests.clear()
        hub.blobs.lfs.clear()
        hub.cut(cut, times=times, skip=number)
        try:
            push(target, saved)
            completed = True
        except SLAHubError:
            completed = False
        assert completed or times == 99, steps[number]
        assert len(hub.requests) > number, (steps, hub.requests)
        hub.heal()
        repo = hub.repos.get(("model", target))
        found = tree(hub, target) if repo else set()
        assert found == whole if completed else found in (set(), whole), steps[number]
        push(target, saved)
        assert tree(hub, target) == whole
        assert len(hub.repos["model", target].history()) == 2, steps[number]
    assert {path.name: path.read_bytes() for path in saved[0].iterdir()} == before


@pytest.mark.parametrize("status", [401, 403, 412])
def test_a_push_refused_in_the_middle_leaves_nothing(hub, transport, repo_id, saved, status):
    for number in range(len(steps_of_a_push(hub, repo_id, saved))):
        target = f"{repo_id}-{number}"
        hub.blobs.lfs.clear()
        hub.fail(status, times=99, skip=number)
        with pytest.raises(SLAHubError) as caught:
            push(target, saved)
        hub.heal()
        assert "hf_alice_token" not in str(caught.value)
        repo = hub.repos.get(("model", target))
        assert repo is None or tree(hub, target) == set()
        push(target, saved)
        assert tree(hub, target) == {"sla_attention.pt", "sla_attention.safetensors"}


@pytest.mark.parametrize("cut", ["before", "after", "middle"])
def test_a_pull_cut_at_each_request_in_turn(hub, transport, repo_id, saved, cut, tmp_path):
    """A load either has the whole file or raises, and no part of one is taken for it later."""
    push(repo_id, saved)
    hub.requests.clear()
    download(Remote(repo_id, cache_dir=tmp_path / "count"), "sla_attention.safetensors", "sla_attention.pt")
    total = len(hub.requests)
    assert total >= 2
    for number in range(total):
        for times in (1, 99):
            cache = tmp_path / f"{number}-{times}"
            model, _ = make("wan")
            hub.cut(cut, times=times, skip=number)
            try:
                load_sla_weights(model, repo_id, cache_dir=cache)
                assert same(model, saved)
            except (SLAHubError, SLAStateError):
                assert not sla_parameters(model)
            hub.heal()
            try:
                load_sla_weights(model, repo_id, cache_dir=cache, local_files_only=True)
                assert same(model, saved)
            except SLAHubError:
                assert not sla_parameters(model)
            load_sla_weights(model, repo_id, cache_dir=cache)
            assert same(model, saved)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, transport, repo_id, saved, caplog, capsys):
    caplog.set_level("DEBUG")
    push(repo_id, saved, token="hf_alice_token")
    load_sla_weights(make("wan")[0], repo_id, token="hf_alice_token")
    for path, authorization in hub.authorizations:
        assert (authorization is None) == path.startswith(("/_cdn/", "/_lfs/")) or path.endswith("/verify"), path
    output = capsys.readouterr()
    assert "hf_alice_token" not in caplog.text + output.out + output.err


@pytest.mark.parametrize("token", ["hf_secret\n2", "hf_secret 2", "", "hf_sécret"])
def test_a_token_that_cannot_be_sent_is_not_shown_either(hub, repo_id, saved, token):
    def use(function):
        with pytest.raises(SLAHubError, match="the token is empty, or has spaces") as caught:
            function()
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)  # a traceback shows them

    use(lambda: push(repo_id, saved, token=token))
    use(lambda: load_sla_weights(make("wan")[0], repo_id, token=token))
    use(lambda: remote_header(Remote(repo_id, token=token), "x.safetensors"))
    assert hub.requests == []


def test_a_forced_download_says_what_the_hub_refused(hub, repo_id, saved):
    push(repo_id, saved)
    with pytest.raises(SLAHubError, match=r"does not let you do this with .*: Invalid credentials"):
        load_sla_weights(make("wan")[0], repo_id, token="hf_nonsense", force_download=True)


def test_hub_status(hub, monkeypatch):
    assert hub_status() == {"endpoint": hub.url, "token": True, "user": "alice", "reachable": True}
    assert hub_status("hf_nonsense")["reachable"]
    assert str(hub_status("hf_nonsense")["problem"]).startswith("the Hub does not let you do this: ")
    hub.cut("before", times=99)
    status = hub_status()
    assert not status["reachable"]
    assert "couldn't connect" in status["problem"]
    assert os.environ["HF_TOKEN"] not in str(status)
