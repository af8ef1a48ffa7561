"""One trial: how it learns, what exactly its devices do, and where else to look."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as grafana

from boards.layout import TO_HOST, TO_RAY, TO_REPORT, dashboard, variables
from boards.panels import (
    BYTES,
    CELSIUS,
    COUNT,
    EACH,
    HERTZ,
    JOULES,
    NUMBER,
    PER_SECOND,
    RATIO,
    WATTS,
    AnyPanel,
    Query,
    curves,
    figure,
    linked,
    path,
    rows,
    time_line,
)

CHOSEN = '{run=~"$run", stage=~"$stage", trial=~"$trial"}'
DEVICE = "{{instance}} {{device}} {{uuid}}"
INFO = f"wattier_trial_info{CHOSEN}"


def own(metric: str) -> str:
    """A figure of the trial, whichever rank tells it."""
    return f"max by (run, stage, trial) (wattier_trial_{metric}{CHOSEN})"


def last(metric: str) -> str:
    """The same, of a trial that has ended within the time range: its last word."""
    return f"max by (run, stage, trial) (last_over_time(wattier_trial_{metric}{CHOSEN}[$__range]))"


def devices(metric: str) -> str:
    """A figure of exactly the trial's devices: a filter, not a product, so that one that ranks share is there once."""
    return f"{metric} and on (instance, uuid) {INFO}"


def _figures() -> list[AnyPanel]:
    joules = f"last_over_time(wattier_trial_metered_joules_total{CHOSEN}[$__range])"
    energy = f"sum(max by (run, stage, trial, rank) ({joules}))"
    ranks = f"count(group by (run, stage, trial, rank) (last_over_time({INFO}[$__range])))"
    nodes = f"count(group by (instance) (last_over_time({INFO}[$__range])))"
    return [
        linked(figure("Loss", "The latest.", NUMBER, Query(last("val_loss"))), TO_REPORT, TO_RAY),
        figure("Energy so far", "All ranks, restarts included: its meter.", JOULES, Query(energy)),
        figure("Epochs done", "Of those planned.", RATIO, Query(f"{last('epoch')} / {last('epochs_planned')}")),
        figure("Speed", "Structures a second.", PER_SECOND, Query(last("structures_per_second"))),
        figure("Ranks", "Processes that train it.", COUNT, Query(ranks)),
        figure("Nodes", "Hosts they are on.", COUNT, Query(nodes)),
    ]


def _learning() -> list[AnyPanel]:
    watts, speed = f"wattier:trial_power_watts:sum{CHOSEN}", f"wattier:trial_structures_per_second:max{CHOSEN}"
    return [
        path(
            "Loss by epoch",
            "Validation loss after each epoch.",
            ("epoch", Query(own("epoch"), "epoch"), COUNT),
            ("validation loss", Query(own("val_loss"), "validation loss"), NUMBER),
        ),
        curves(
            "Energy by time",
            "Its own meter, and its share of what the exporters account for; they should agree.",
            JOULES,
            Query(f"wattier:trial_energy_joules:last{CHOSEN}", "metered {{trial}}"),
            Query(
                "sum by (run, stage, trial) (max by (run, stage, trial, rank, uuid) "
                f"(wattier_trial_energy_joules_total{CHOSEN}))",
                "accounted {{trial}}",
            ),
            axis="energy",
        ),
        curves(
            "Power",
            "Its part of its devices' power. Empty where power is only estimated.",
            WATTS,
            Query(watts, "{{trial}}"),
            axis="power",
        ),
        curves(
            "Joules per structure",
            "Power over speed. Empty where power is only estimated.",
            EACH,
            Query(f"{watts} / {speed}", "{{trial}}"),
            axis="energy per structure",
        ),
    ]


def _ranks() -> AnyPanel:
    return rows(
        "Ranks and devices",
        "Which rank is on which device, and what part of it is the trial's.",
        {
            "registered": (
                f"max by (trial, rank, instance, uuid, fraction) (last_over_time({INFO}[$__range]))",
                COUNT,
            )
        },
    )


def _devices() -> list[AnyPanel]:
    held = devices("wattier_throttled")
    by_reason = devices('wattier_throttled{reason!="none"}')
    panels: list[AnyPanel] = [
        linked(
            curves(
                title, text, unit, *(Query(devices(metric), f"{word}{DEVICE}") for word, metric in metrics), axis=axis
            ),
            TO_HOST,
        )
        for title, text, unit, axis, metrics in (
            (
                "Device power",
                "Whole devices, whoever else is on them. A die of an MI250X has its part of the package's power.",
                WATTS,
                "power",
                [("", "wattier_power_watts")],
            ),
            (
                "Device memory (HBM)",
                "Near the total, the next larger batch fails.",
                BYTES,
                "memory",
                [("used ", "wattier_memory_used_bytes"), ("total ", "wattier_memory_total_bytes")],
            ),
            (
                "Utilisation",
                "Share of time with work; not how well.",
                RATIO,
                "busy",
                [("", "wattier_utilization_ratio")],
            ),
            ("Temperature", "Hottest core sensor.", CELSIUS, "temperature", [("", "wattier_temperature_celsius")]),
            (
                "Clocks",
                "A compute clock that sags under load is throttled.",
                HERTZ,
                "clock",
                [("compute ", "wattier_clock_hertz"), ("memory ", "wattier_memory_clock_hertz")],
            ),
            (
                "Clock over the trial's median",
                "A rank below 1 holds up all others.",
                RATIO,
                "clock",
                [("", "wattier:trial_clock_ratio")],
            ),
        )
    ]
    return [
        *panels,
        time_line(
            "Throttling by reason",
            "Red while it holds the clock of any of its devices down. A power cap at full load is no fault.",
            Query(f"max({held})", "any reason"),
            Query(f"max by (reason) ({by_reason})", "{{reason}}"),
        ),
        _ranks(),
    ]


def build() -> grafana.Dashboard:
    """The dashboard."""
    sections = {"Now": _figures(), "Learning and energy": _learning(), "Its devices": _devices()}
    choices = variables("run", "stage", "trial", many=False)
    return dashboard("trial", "One trial: loss, energy, and exactly its devices.", choices, sections)
