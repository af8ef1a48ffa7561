"""Push a release to a model hub that speaks the protocol of huggingface_hub."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from wattier.errors import UserError
from wattier_gnn.release import MANIFEST, verify_release
from wattier_gnn.release_files import check_hash, read_verified
from wattier_gnn.release_manifest import WEIGHTS, ReleaseManifest

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 1.0
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TOKEN_ADVICE = "Set HF_TOKEN, or log in once with `hf auth login`."
REFUSALS = {
    401: f"the token is missing or not accepted (401), but must be valid. {TOKEN_ADVICE}",
    403: "the token may not write there (403), but must. Use one with write access, or another repository.",
    404: "there is no such place (404). Check ORG/NAME and --endpoint, and that the token may see it.",
}
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
    api = HfApi(endpoint=endpoint, library_name="wattier", library_version=manifest.wattier_version)
    where = f"{api.endpoint}: {repository}"

    def push() -> str:
        # Made anew for each try: the library marks what it has uploaded.
        files = [CommitOperationAdd(name, content) for name, content in _contents(folder, manifest)]
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = f"{manifest.name}, exported by Wattier {manifest.wattier_version}"
        commit = api.create_commit(repository, files, commit_message=message, revision=revision)
        return str(commit.commit_url)

    return _with_patience(push, where, wait)


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise UserError(f"--endpoint: holds a password, but must not: addresses are logged. {TOKEN_ADVICE}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--endpoint: is {endpoint!r}, but must be an address that begins with https:// or http://.")


def _contents(folder: Path, manifest: ReleaseManifest) -> Iterator[tuple[str, bytes | str]]:
    """The bytes that have been checked, of each file; of weights, which may be large, the path.

    The hub refuses weights whose hash is not the one announced, which is compared here.
    """
    hashes = {**manifest.files, MANIFEST: manifest.sha256}
    for name, due in hashes.items():
        if name.endswith(f"/{WEIGHTS}"):
            check_hash(folder, name, due)
            yield name, str(folder / name)
        else:
            yield name, read_verified(folder, name, due)


def _with_patience(push: Callable[[], T], where: str, wait: Callable[[float], None]) -> T:
    """Try again where the hub or the network had a bad moment; a commit is whole or not there, so that does no harm."""
    for attempt in itertools.count(1):
        try:
            return push()
        except (_transport_error(), OSError, RuntimeError, ValueError, KeyError) as error:
            cause = _cause(error)
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if attempt < ATTEMPTS and (
                isinstance(cause, _transport_error()) if status is None else status >= 500 or status == 429
            ):
                wait(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
                continue
            raise UserError(f"{where}: {_reason(cause, status)}") from error
    raise AssertionError  # the loop has returned or raised


def _cause(error: Exception) -> BaseException:
    """An upload's own error hides behind one that names the file."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _transport_error() -> type[Exception]:
    """What the library's HTTP client raises; the library has changed that client, so it is asked what its own is."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__mro__[1]
    return base


def _reason(error: BaseException, status: int | None) -> str:
    """Why, in words that hold no header and so no token."""
    if isinstance(error, UnicodeError):
        return f"the token holds a character that no token has, but must be one. {TOKEN_ADVICE}"
    if status in REFUSALS:
        return REFUSALS[status]
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200] or type(error).__name__
    if status is not None:
        return f"answers {status} ({said}). Try again later."
    if isinstance(error, _transport_error()):
        return f"cannot be reached ({said}). Check the network and --endpoint."
    return f"does not answer as a hub does ({said}). Check --endpoint."
