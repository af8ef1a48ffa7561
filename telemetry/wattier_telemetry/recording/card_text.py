"""The energy report card as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime

from wattier_telemetry.recording.card import Card, DeviceCard, TrialCard
from wattier_telemetry.recording.tally import Bill

_WIDTH = 80
_COMPARABLE_RATIO = 0.05  # a trial throttled for longer is not comparable with others


def render(card: Card) -> str:
    """Return the card as lines of text."""
    return "".join(f"{part.rstrip()}\n" for line in _lines(card) for part in _folded(line))


def _folded(line: str) -> list[str]:
    return [line] if len(line) <= _WIDTH else textwrap.wrap(line, _WIDTH, subsequent_indent=" " * 6)


def _lines(card: Card) -> Iterator[str]:
    yield f"Energy report card: {printable(card.file)}"
    yield f"{_moment(card.start_seconds)} to {_moment(card.end_seconds)}, {card.samples} samples"
    yield from _headline("Whole job")
    yield from _bill(card.job, card.grid_grams_co2_per_kwh)
    if card.joules_by_domain:
        yield _item("by domain", ", ".join(f"{name} {figure(j)} J" for name, j in card.joules_by_domain.items()))
    if card.trials:
        yield _item("unattributed", _joules(card.unattributed_joules))
    yield from _metrics(card.job)
    for trial in card.trials:
        yield from _trial(trial, card)
    for device in card.devices:
        yield from _device(device, card)
    if card.warnings:
        yield from _headline("Warnings")
        yield from (f"  {printable(warning)}" for warning in card.warnings)


def _trial(trial: TrialCard, card: Card) -> Iterator[str]:
    ranks = f"{len(trial.ranks)} rank{'s' if len(trial.ranks) > 1 else ''}"
    yield from _headline(f"Trial {printable(trial.run)}/{printable(trial.stage)}/{printable(trial.trial)}, {ranks}")
    yield from _bill(trial.bill, card.grid_grams_co2_per_kwh)
    for uuid, joules in trial.joules_by_device.items():
        yield _item("of device", f"{printable(uuid)}: {figure(joules)} J")
    if (trial.bill.throttled_ratio or 0.0) > _COMPARABLE_RATIO:
        yield f"  Throttled for over {_COMPARABLE_RATIO:.0%} of its time: do not compare its joules."
    yield from _metrics(trial.bill)


def _device(device: DeviceCard, card: Card) -> Iterator[str]:
    name = printable(device.device) if device.name == device.device else printable(f"{device.name} {device.device}")
    source = f", {printable(device.source)}" if device.source else ""
    yield from _headline(f"Device {name} [{device.domain}{source}]")
    if not device.in_total:
        yield "  Not added to the job: other devices measure the same watts."
    yield from _bill(device.bill, card.grid_grams_co2_per_kwh)
    if card.trials:
        yield _item("unattributed", _joules(device.unattributed_joules))
    yield from _metrics(device.bill)


def _bill(bill: Bill, grid: float | None) -> Iterator[str]:
    yield _item("duration", f"{span(bill.seconds)} ({bill.seconds:.3f} s)")
    yield _item("energy", _joules(bill.joules))
    if bill.method is not None:
        yield _item("known by", f"{bill.method}, {100 * bill.coverage_ratio:.1f} % of the time measured")
    if bill.joules_low is not None and bill.joules_high is not None and bill.joules_high > bill.joules_low:
        yield _item("between", f"{figure(bill.joules_low)} J and {figure(bill.joules_high)} J")
    if bill.grams_co2 is not None:
        yield _item("carbon", f"{figure(bill.grams_co2)} gCO2 at the stated {grid:g} gCO2/kWh")
    if bill.throttled_seconds is not None:
        reasons = ", ".join(f"{printable(name)} {seconds:.1f} s" for name, seconds in bill.throttled_seconds.items())
        yield _item(
            "throttled", f"{100 * (bill.throttled_ratio or 0.0):.1f} % of the time" + (reasons and f": {reasons}")
        )


def _metrics(bill: Bill) -> Iterator[str]:
    if bill.metrics:
        yield f"  {'':<30}{'mean':>14}{'max':>14}"
    for name, spread in bill.metrics.items():
        yield f"  {name:<30}{figure(spread.mean):>14}{figure(spread.max):>14}"


def _headline(text: str) -> tuple[str, str]:
    return "", f"{text} {'-' * (_WIDTH - 1 - len(text))}"


def _item(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _joules(joules: float | None) -> str:
    return "not measured" if joules is None else f"{figure(joules)} J = {joules / 3.6e6:.6g} kWh"


def figure(value: float) -> str:
    """Return a number that a person can read: thousands apart, or five digits that count."""
    if abs(value) >= 1e15:
        return f"{value:.4e}"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.1f}" if abs(value) >= 1e3 else f"{value:.5g}"


def span(seconds: float) -> str:
    """Return a duration in hours, minutes and seconds; hours go on counting beyond a day."""
    whole = round(seconds)
    return f"{whole // 3600} h {whole // 60 % 60:02} min {whole % 60:02} s"


def printable(text: str) -> str:
    """Return a name without what would command the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"
