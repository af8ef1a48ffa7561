"""What ``selection.json`` says beyond ids and reasons, where it does: figures, near misses, choices by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wattier.rundir import RunDir, decode, read_json

FLAG_WORDS = {"throttled": "throttled", "partly_measured": "partly measured", "pinned": "pinned by hand"}


class PickFigures(NamedTuple):
    """Figures of one pick or near miss; None = unknown, or a selection of an earlier version."""

    val_loss: float | None
    val_loss_noise: float | None  # standard deviation
    energy_joules: float | None
    energy_method: str | None
    joules_low: float | None
    joules_high: float | None
    projected_joules: float | None  # of its full training
    flags: tuple[str, ...]


class NearMiss(NamedTuple):
    """A trial that was nearly picked, and why it was not."""

    trial_id: str
    tier: str
    kind: str
    reason: str
    figures: PickFigures


class SelectionDetails(NamedTuple):
    """Everything about a selection that is no tier."""

    figures: dict[str, PickFigures]  # by trial id, of picks
    near_misses: tuple[NearMiss, ...]
    pinned: tuple[str, ...]
    vetoed: tuple[str, ...]
    notes: dict[str, tuple[str, ...]]  # by tier
    noise: str | None  # in words
    saved_joules: float | None


NOTHING = SelectionDetails({}, (), (), (), {}, None, None)


def selection_details(run: RunDir) -> SelectionDetails:
    """The details of a run's selection, all empty before there is one.

    Raises:
        UserError: the file is damaged.
    """
    if not run.selection_path.exists():
        return NOTHING
    return decode(run.selection_path, details_of, read_json(run.selection_path))


def details_of(data: Mapping[str, Any]) -> SelectionDetails:
    """Details of the JSON of a selection."""
    picks = [pick for tier in data["tiers"] for pick in tier["picks"]]
    every, chosen = data.get("projected_joules_all"), data.get("projected_joules")
    return SelectionDetails(
        figures={str(pick["trial_id"]): _figures(pick) for pick in picks},
        near_misses=tuple(
            NearMiss(
                str(near["trial_id"]), str(near.get("tier") or ""), str(near.get("kind") or ""),
                str(near.get("reason") or ""), _figures(near),
            )
            for near in data.get("near_misses") or ()
        ),
        pinned=tuple(map(str, data.get("pinned") or ())),
        vetoed=tuple(map(str, data.get("vetoed") or ())),
        notes={str(tier["name"]): tuple(map(str, tier.get("notes") or ())) for tier in data["tiers"]},
        noise=_noise(data.get("noise")),
        saved_joules=every - chosen if every is not None and chosen is not None else None,
    )  # fmt: skip


def _figures(pick: Mapping[str, Any]) -> PickFigures:
    return PickFigures(
        val_loss=pick.get("val_loss"),
        val_loss_noise=pick.get("val_loss_noise"),
        energy_joules=pick.get("energy_joules"),
        energy_method=pick.get("energy_method"),
        joules_low=pick.get("joules_low"),
        joules_high=pick.get("joules_high"),
        projected_joules=pick.get("projected_joules"),
        flags=tuple(map(str, pick.get("flags") or ())),
    )


def _noise(noise: Mapping[str, Any] | None) -> str | None:
    if not noise or noise.get("std") is None:
        return None
    source = f", from {noise['source']}" if noise.get("source") else ""
    trials = f" of {noise['trials']} trials" if noise.get("trials") else ""
    return f"The noise of a validation loss is {noise['std']:.3g} (standard deviation{source}{trials})."
