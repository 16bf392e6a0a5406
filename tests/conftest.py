"""Every test run has a Hugging Face Hub of its own on loopback; nothing reaches the real one."""

import atexit
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # models, hub_server

from hub_server import LocalHub

# Before anything imports huggingface_hub, which reads its environment only then.
_home = tempfile.TemporaryDirectory(prefix="hf-home-")
_hub = LocalHub(users={"alice": "hf_alice_token", "bob": "hf_bob_token"}, orgs={"acme": ["alice"]}).__enter__()
os.environ.update(
    HF_ENDPOINT=_hub.url, HF_HOME=_home.name, HF_TOKEN="hf_alice_token", HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1", HF_XET_CLIENT_RETRY_BASE_DELAY="10ms", HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="2",
)  # fmt: skip
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)

import pytest  # noqa: E402


@atexit.register
def _close() -> None:
    _hub.__exit__()
    _home.cleanup()


@pytest.fixture
def hub(monkeypatch):
    """The local Hub, healed and with an empty log; nobody waits for it in earnest."""
    import diffusers_sla.hub

    _hub.heal()
    _hub.requests.clear()
    _hub.authorizations.clear()
    monkeypatch.setattr(diffusers_sla.hub.time, "sleep", lambda seconds: None)
    yield _hub
    _hub.heal()


@pytest.fixture(params=["lfs", "xet"])
def transport(request, monkeypatch):
    """How the client moves big files."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def repo_id(request):
    """A repository that no other test has: the client remembers what it saw of one."""
    _hub.counter = getattr(_hub, "counter", 0) + 1
    return f"alice/sla-{_hub.counter}"
