"""Why trials did not end well, in the few words of a label: a database bears no free text."""

from __future__ import annotations

from wattier.records import TrialResult

_MARKS = {  # what the reasons of `outcome` and of the launchers say, first match wins
    "out of memory": "out_of_memory",
    "its node was lost": "node_lost",
    "it stalled:": "stalled",
    "not started:": "over_budget",
    "was killed": "killed",
}


def reason_class(result: TrialResult) -> str | None:
    """Why a trial did not end well, in one of `REASONS`; None = it did."""
    if result.diverged:
        return "diverged"
    if result.status != "failed":
        return None
    text = (result.error or "").lower()
    return next((reason for mark, reason in _MARKS.items() if mark in text), "error")
