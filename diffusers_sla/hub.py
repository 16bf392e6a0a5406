"""What goes to the Hugging Face Hub and comes from it. Besides cards.py the only file that knows huggingface_hub.

Everything the client raises leaves here as SLAHubError, in the sentences diffusers uses for it.
"""

import logging
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub import __version__ as client_version
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
    XetDownloadError,
)
from huggingface_hub.utils import httpx, validate_repo_id

from .errors import SLAHubError, SLAStateFormatError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
_AGAIN = (408, 412, 429, 500, 502, 503, 504)
_USER_AGENT = {"file_type": "sla_attention", "framework": "pytorch"}


@dataclass
class Remote:
    """Where a file comes from: the Hub arguments that every loader of diffusers takes."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False


def is_repo_id(source: str | os.PathLike) -> bool:
    """Whether `source` can only mean a repository: text like "user/repo", and no such path here."""
    if not isinstance(source, str) or os.path.exists(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return False
    if source.endswith((".pt", ".safetensors")) or source.startswith("."):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def check_repo_id(repo_id: str) -> None:
    """That a repository to push to is "user/name": without the first part the client would make it somewhere else.

    Raises:
        SLAHubError: It is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise _translated(error, Remote(repo_id), ()) from error
    if "/" not in repo_id:
        raise SLAHubError(f"{repo_id!r} is not a repository id such as 'user/name'")


def download(remote: Remote, *names: str) -> Path:
    """The first of `names` that the repository has, in the cache.

    Raises:
        SLAHubError: There is no such repository, revision or file, or it cannot be had.
    """
    _check_token(remote.token)
    *optional, last = names
    for name in optional:
        try:
            return _download(remote, name)
        except EntryNotFoundError:  # also when only the cache may be asked: the next may be in it
            continue
        except Exception as error:
            raise _translated(error, remote, names) from error
    try:
        return _download(remote, last)
    except Exception as error:
        raise _translated(error, remote, names) from error


def _download(remote: Remote, name: str) -> Path:
    return Path(
        hf_hub_download(
            remote.repo_id, name, subfolder=remote.subfolder, revision=remote.revision, token=remote.token,
            cache_dir=None if remote.cache_dir is None else os.fspath(remote.cache_dir),
            local_files_only=remote.local_files_only, force_download=remote.force_download,
            library_name="diffusers-sla", user_agent=_USER_AGENT,
        )
    )  # fmt: skip


def download_configs(remote: Remote) -> Path:
    """A folder with the configs of a repository's models, and none of their weights.

    Raises:
        SLAHubError: See `download`.
    """
    _check_token(remote.token)
    patterns = ["model_index.json", "config.json", "*/config.json"]
    try:
        return Path(
            snapshot_download(
                remote.repo_id, revision=remote.revision, token=remote.token, allow_patterns=patterns,
                library_name="diffusers-sla",
            )
        )  # fmt: skip
    except Exception as error:
        raise _translated(error, remote, ("config.json",)) from error


def remote_header(remote: Remote, name: str) -> tuple[dict[str, str], dict[str, tuple[str, list[int]]]]:
    """(metadata, (dtype, shape) by tensor) of a .safetensors file on the Hub, by one request for its first bytes.

    Raises:
        SLAHubError: See `download`.
        SLAStateFormatError: The header is damaged.
    """
    path = f"{remote.subfolder}/{name}" if remote.subfolder else name
    api = _api(remote.token)
    try:
        found = api.parse_safetensors_file_metadata(remote.repo_id, path, revision=remote.revision)
        header = {str(key): str(value) for key, value in found.metadata.items()}
        tensors = {key: (str(tensor.dtype), list(map(int, tensor.shape))) for key, tensor in found.tensors.items()}
        if any(not 0 <= size < 1 << 31 for _, shape in tensors.values() for size in shape):
            raise TypeError("a tensor has an impossible shape")
    except (SafetensorsParsingError, AttributeError, KeyError, RecursionError, TypeError) as error:
        # The client takes what is in the header for what it should be.
        raise SLAStateFormatError(f"{remote.repo_id}/{path} is damaged: its header is not one: {error}") from error
    except Exception as error:
        raise _translated(error, remote, (name,)) from error
    return header, tensors


def remote_files(remote: Remote) -> list[str]:
    """Names of the files in the repository's folder that `remote` means.

    Raises:
        SLAHubError: See `download`.
    """
    api = _api(remote.token)
    try:
        names = api.list_repo_files(remote.repo_id, revision=remote.revision)
    except Exception as error:
        raise _translated(error, remote, ()) from error
    prefix = f"{remote.subfolder}/" if remote.subfolder else ""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@dataclass
class Pushed:
    """What came of a push. commit is the head of the branch, or of the pull request; changed is whether it is new."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    files: list[str]
    pull_request: str | None = None


Files = Mapping[str, bytes | str | os.PathLike]


def push_files(
    repo_id: str,
    files_for: Callable[[str | None], Files],
    *,
    message: str,
    description: str = "",
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    space_sdk: str | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Commit files in one go, creating repository and branch where they are missing; nothing new is no commit.

    Throttling, server errors and broken connections are tried again, with growing pauses. When somebody else commits
    in between, `files_for` is asked again, so that it builds on what they wrote.

    Args:
        files_for: Given the text of a model's README.md, or None, the files by path in the repository.

    Raises:
        SLAHubError: Refused, or still failing after six attempts. Then nothing was committed, except where the last
            answer was lost: pushing again finds out.
    """
    if repo_type == "kernel" and client_version.startswith("1."):
        raise SLAHubError(f"huggingface_hub {client_version} cannot commit to kernel repositories; version 2 can")
    check_repo_id(repo_id)
    api = _api(token)
    opening = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            api.create_repo(
                repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk
            )  # fmt: skip
            if revision is not None and revision != constants.DEFAULT_REVISION and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
            head = str(info.sha)
            siblings = (info.siblings or ()) if isinstance(info, ModelInfo) else ()
            there = any(sibling.rfilename == "README.md" for sibling in siblings)
            files = files_for(_readme(api, repo_id, head) if there else None)
            opening = create_pr
            commit = api.create_commit(
                repo_id, [CommitOperationAdd(path, _content(content)) for path, content in files.items()],
                commit_message=message, commit_description=description, repo_type=repo_type, revision=revision,
                create_pr=create_pr, parent_commit=None if create_pr else head,
            )  # fmt: skip
            return Pushed(repo_id, str(commit.repo_url), commit.oid, commit.oid != head, sorted(files), commit.pr_url)
        except Exception as error:
            cause = _cause(error)
            wait = _wait_before_retry(cause, attempt)
            if opening and wait is not None and _status(cause) != 429:
                raise SLAHubError(
                    f"the connection to the Hub broke while the pull request was opened; look whether "
                    f"{api.endpoint}/{repo_id}/discussions has it before pushing again"
                ) from error
            if wait is None or attempt == ATTEMPTS:
                raise _translated(cause, Remote(repo_id, revision, token=token), tuple()) from error
            logger.warning(
                "the Hub answered %s; trying again in %.0f s (%d of %d)",
                _status(cause) or type(cause).__name__, wait, attempt, ATTEMPTS - 1,
            )  # fmt: skip
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def hub_status(token: str | bool | None = None) -> dict[str, str | bool | None]:
    """Whether the Hub answers, and as whom it knows us; never the token itself."""
    found: dict[str, str | bool | None] = {"endpoint": constants.ENDPOINT, "token": get_token() is not None}
    try:
        found["user"] = _api(token).whoami()["name"] if found["token"] else None
        if not found["token"]:
            httpx.head(constants.ENDPOINT, timeout=10)
        found["reachable"] = True
    except Exception as error:
        found["reachable"] = _status(error) is not None  # refused is an answer too
        found["problem"] = str(_translated(error, Remote(""), ()))
    return found


def _api(token: str | bool | None) -> HfApi:
    _check_token(token)
    return HfApi(token=token, library_name="diffusers-sla", user_agent=_USER_AGENT)


def _check_token(token: str | bool | None) -> None:
    # Such a token cannot be sent, and the client's complaint would quote it.
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise SLAHubError("the token is empty, or has spaces, line breaks or other characters that no token has")


def _content(content: bytes | str | os.PathLike) -> bytes | str:
    return content if isinstance(content, bytes) else os.fspath(content)


def _readme(api: HfApi, repo_id: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, "README.md", revision=commit, cache_dir=folder)
        return Path(path).read_text(encoding="utf-8-sig")


def _cause(error: BaseException) -> BaseException:
    """The client wraps what goes wrong while it uploads big files."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and isinstance(error, ConnectionError):  # hf_xet only tells it in its message
        told = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
        status = int(told[1]) if told else None
    return status


def _wait_before_retry(error: BaseException, attempt: int) -> float | None:
    """Seconds, or None for what would fail again."""
    status = _status(error)
    broken = isinstance(error, httpx.TransportError | ConnectionError) and not isinstance(error, OfflineModeIsEnabled)
    if status is None and not broken:
        return None
    if status is not None and status not in _AGAIN:
        return None
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked), 300) if asked.isdecimal() else min(2**attempt, 30) * (0.75 + random.random() / 2)


def _translated(error: BaseException, remote: Remote, names: tuple[str, ...]) -> Exception:
    """The error as our users know it. The token is in none of the client's messages."""
    if isinstance(error, ValueError) and isinstance(error.__cause__, HfHubHTTPError):  # of a forced download
        error = error.__cause__
    repo, named = remote.repo_id, " or ".join(names)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, GatedRepoError):
        return SLAHubError(
            f"{repo} is a gated repository: ask for access at {constants.ENDPOINT}/{repo}, then log in with "
            "`hf auth login` or pass `token`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return SLAHubError(
            f"{repo} is not a local folder and is not a valid model identifier listed on "
            f"'{constants.ENDPOINT}/models'. If this is a private repository, make sure to pass a token having "
            "permission to this repo with `token` or log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return SLAHubError(
            f"{remote.revision} is not a valid git identifier (branch name, tag name or commit id) that exists for "
            f"this model name. Check the model page at '{constants.ENDPOINT}/{repo}' for available revisions."
        )
    offline = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | FileMetadataError)
    if offline or (isinstance(error, httpx.TransportError | ConnectionError) and _status(error) is None):
        if not names:
            return SLAHubError(f"We couldn't connect to '{constants.ENDPOINT}': {first}")
        return SLAHubError(
            f"We couldn't connect to '{constants.ENDPOINT}' to load this model, couldn't find it in the cached files "
            f"and it looks like {repo} is not the path to a directory containing a file named {named}: {first}"
        )
    if isinstance(error, EntryNotFoundError):
        where = f" in a folder {remote.subfolder}" if remote.subfolder else ""
        return SLAHubError(f"{repo} does not appear to have a file named {named}{where}.")
    if isinstance(error, HFValidationError):
        return SLAHubError(f"{repo!r} is not a repository id such as 'user/name': {first}")
    if _status(error) in (401, 403):
        it = f" with {repo}" if repo else ""
        return SLAHubError(
            f"the Hub does not let you do this{it}: {_server_message(error).rstrip('.')}. "
            "Log in with `hf auth login`, or pass a token with write permission"
        )
    if _status(error) is not None:
        return SLAHubError(
            f"There was a specific connection error when trying to reach {repo}: "
            f"{_status(error)} {_server_message(error)}"
        )
    if isinstance(error, OSError | ValueError | RuntimeError | XetDownloadError):
        return SLAHubError(f"{repo}: {type(error).__name__}: {first}")
    raise error


def _server_message(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(str(message).split())


@contextmanager
def quiet_progress(quiet: bool) -> Iterator[None]:
    """Without the client's progress bars inside the block, if `quiet` or where nobody watches."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not (quiet or not sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
