"""The one exception that users are meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem the user can mend. The message is one line: where, what it is, what it must be, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'epochs'?`` or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
