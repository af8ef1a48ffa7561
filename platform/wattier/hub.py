"""Push a release to a model hub that speaks the protocol of huggingface_hub."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from wattier.errors import UserError
from wattier_gnn.release import MANIFEST, verify_release
from wattier_gnn.release_manifest import ReleaseManifest

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 1.0
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TOKEN_ADVICE = "Set HF_TOKEN, or log in once with `hf auth login`."
T = TypeVar("T")


def push_release(  # noqa: PLR0913  (one parameter an option)
    folder: Path,
    repository: str,
    *,
    endpoint: str | None = None,
    private: bool = False,
    revision: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Push the files that a release names, in one commit; the repository is made if it is not there.

    The token is the library's: of HF_TOKEN, or of the file that its own login keeps. What else lies in the
    repository stays.

    Args:
        folder: a release; it is checked first.
        repository: ORG/NAME.
        endpoint: address of the hub, None = the library's own.
        private: whether a repository that is made now is seen by its owners alone.
        revision: branch, made if it is not there; None = the main one.
        wait: sleeps for some seconds before another try.

    Returns:
        The address of the commit.

    Raises:
        UserError: huggingface_hub is not installed, or the hub cannot be reached or refuses.
        DataError: the release is damaged.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository}: is no repository, but must be ORG/NAME. Give it as your-name/{folder.name}.")
    if endpoint is not None:
        _check_endpoint(endpoint)
    manifest = verify_release(folder)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise UserError("huggingface_hub: is not installed, but a push needs it. pip install 'wattier[hub]'") from error
    api = HfApi(endpoint=endpoint, library_name="wattier", library_version=str(manifest.data["wattier_version"]))
    where = f"{api.endpoint}: {repository}"

    def push() -> str:
        # Made anew for each try: the library marks what it has uploaded.
        files = [CommitOperationAdd(name, str(folder / name)) for name in (*manifest.files, MANIFEST)]
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = f"{manifest.name}, exported by Wattier {manifest.data['wattier_version']}"
        commit = api.create_commit(repository, files, commit_message=message, revision=revision)
        _check_hashes(folder, manifest, files)
        return str(commit.commit_url)

    return _with_patience(push, where, wait)


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise UserError(f"--endpoint: holds a password, but must not: addresses are logged. {TOKEN_ADVICE}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--endpoint: is {endpoint!r}, but must be an address that begins with https:// or http://.")


def _check_hashes(folder: Path, manifest: ReleaseManifest, files: list[Any]) -> None:
    """What was pushed must be what was checked before; a file may have been changed in between."""
    for file in files:
        due = manifest.files.get(file.path_in_repo, manifest.sha256)
        if file.upload_info.sha256.hex() != due:
            raise UserError(f"{folder / file.path_in_repo}: was changed while it was pushed. Push it again.")


def _with_patience(push: Callable[[], T], where: str, wait: Callable[[float], None]) -> T:
    """Try again where the hub or the network had a bad moment; a commit is whole or not there, so that does no harm."""
    for attempt in itertools.count(1):
        try:
            return push()
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            cause = _cause(error)
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if attempt < ATTEMPTS and (_is_of_transport(cause) if status is None else status >= 500 or status == 429):
                wait(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
                continue
            raise UserError(f"{where}: {_reason(cause, status)}") from error
    raise AssertionError  # the loop has returned or raised


def _cause(error: Exception) -> BaseException:
    """An upload's own error hides behind one that names the file."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _is_of_transport(error: BaseException) -> bool:
    """Whether no answer came. The library has changed its HTTP client before, so that goes by its own base class."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError.__mro__[1])


def _reason(error: BaseException, status: int | None) -> str:
    """Why, in words that hold no header and so no token."""
    if status == 401:
        return f"the token is missing or not accepted (401), but must be valid. {TOKEN_ADVICE}"
    if status == 403:
        return "the token may not write there (403), but must. Use one with write access, or another repository."
    if status == 404:
        return "there is no such place (404). Check ORG/NAME and --endpoint, and that the token may see it."
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200] or type(error).__name__
    if status is not None:
        return f"answers {status} ({said}). Try again later."
    if _is_of_transport(error):
        return f"cannot be reached ({said}). Check the network and --endpoint."
    return f"does not answer as a hub does ({said}). Check --endpoint."
