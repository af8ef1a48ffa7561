"""Which database mirrors a run for optuna-dashboard, and how no password of it ever reaches a file."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from wattier.errors import did_you_mean

if TYPE_CHECKING:
    from wattier.config import RunConfig

STORAGE_VARIABLE = "WATTIER_OPTUNA_STORAGE"  # may hold a password: only the driver reads it, and nobody inherits it
DATABASES = ("mariadb", "mysql", "postgresql", "sqlite")
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+]*)://(?P<rest>.*)", re.DOTALL)
_USER_INFO = re.compile(r"[^:/]*:(?P<password>[^@]*)@")  # as SQLAlchemy splits it, which is not as RFC 3986 does
_SECRET_KEYS = re.compile(r"(pass|password|passwd|pwd|token|secret|connect)$", re.IGNORECASE)
_taken: list[str] = []


def check_url(url: str, *, password_allowed: bool = False) -> str:
    """The URL of a database, if it is one that Optuna can write and that may be written to a file.

    Raises:
        ValueError: it is no such URL, or holds a password; the message never repeats it.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("is no URL of a database. Give one such as postgresql://host/name or sqlite:////path/file.db")
    database = match["scheme"].split("+")[0].lower()
    if database not in DATABASES:
        hint = did_you_mean(database, DATABASES) or f" Known are {', '.join(DATABASES)}"
        raise ValueError(f"names no database that Optuna can write.{hint}")
    if not password_allowed and secrets_of(url):
        raise ValueError(
            "holds a password, which would come to lie in files. Remove it, and put it into ~/.pgpass, a file "
            f"that PGPASSFILE names or a service file (postgresql:///?service=NAME), or set {STORAGE_VARIABLE} to the "
            "whole URL where the search is started"
        )
    if database == "sqlite" and match["rest"].strip("/") in ("", ":memory:"):
        raise ValueError("names no file, so that the study would be lost. Give one such as sqlite:////path/file.db")
    return url


def secrets_of(url: str) -> list[str]:
    """Every password in a URL, as it stands there and decoded; longest first."""
    rest = url.split("://", 1)[-1]
    found = [match["password"]] if (match := _USER_INFO.match(rest)) else []
    _, _, query = rest.partition("?")
    found += [value for key, value in parse_qsl(query) if _SECRET_KEYS.search(key)]
    found += [part.partition("=")[2] for part in query.split("&") if _SECRET_KEYS.search(part.partition("=")[0])]
    with suppress(ValueError):  # a malformed address; what SQLAlchemy sees in it is found above
        found.append(urlsplit(url).password or "")
    return sorted({text for secret in found for text in (secret, unquote(secret)) if text}, key=len, reverse=True)


def redacted(text: str, url: str) -> str:
    """A message of a database library, in one line and without any password of the URL."""
    for secret in secrets_of(url):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def take_environment() -> str | None:
    """The URL that the environment names, once taken out of it, so that no child process and no job inherits it."""
    url = os.environ.pop(STORAGE_VARIABLE, None)
    if url is not None:
        _taken[:] = [url]
    return _taken[0] if _taken and _taken[0] else None


def chosen_url(config: RunConfig) -> str | None:
    """The database that mirrors a run, the environment's before the config's; None = a file in the run directory."""
    return take_environment() or config.search.storage
