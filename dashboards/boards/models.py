"""Sizes of models side by side: what `wattier bench power` trains, each for a fixed time."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.models.dashboard import VariableOption

from boards.layout import TO_TRIAL, dashboard, variables
from boards.panels import (
    BYTES,
    COUNT,
    EACH,
    JOULES,
    NUMBER,
    PER_SECOND,
    RATIO,
    WATTS,
    AnyPanel,
    Query,
    bars,
    curves,
    linked,
    rows,
)

CHOSEN = '{run=~"$run", stage=~"$stage"}'
SIZE = "{{run}} {{trial}}"
WATTS_OF = f"wattier:trial_power_watts:sum{CHOSEN}"
SPEED_OF = f"wattier:trial_structures_per_second:max{CHOSEN}"


def _panels() -> list[AnyPanel]:
    joules = f"last_over_time(wattier_trial_metered_joules_total{CHOSEN}[$__range])"
    memory = (
        f"max by (run, stage, trial) (wattier_trial_info{CHOSEN} "
        "* on (instance, uuid) group_left () wattier_memory_used_bytes)"
    )
    each = f"avg_over_time({WATTS_OF}[$__range]) / avg_over_time({SPEED_OF}[$__range])"
    return [
        linked(
            curves(
                "Power by size",
                "SMALL, MEDIUM and LARGE side by side: each one's part of its devices' power.",
                WATTS,
                Query(WATTS_OF, SIZE),
                axis="power",
                span=24,
            ),
            TO_TRIAL,
        ),
        bars(
            "Joules per structure",
            "Mean power over mean speed in the time range: what one structure of training costs.",
            EACH,
            Query(f"sort_desc({each})", SIZE),
        ),
        curves(
            "Joules per structure by time",
            "Power over speed.",
            EACH,
            Query(f"{WATTS_OF} / {SPEED_OF}", SIZE),
            axis="energy per structure",
            log=True,
        ),
        curves(
            "Speed by size", "Structures a second.", PER_SECOND, Query(SPEED_OF, SIZE), axis="training speed", log=True
        ),
        curves(
            "Device memory (HBM) by size", "Of the device that uses most.", BYTES, Query(memory, SIZE), axis="memory"
        ),
        curves(
            "Utilisation by size",
            "Of the busiest device.",
            RATIO,
            Query(f"wattier:trial_utilization_ratio:max{CHOSEN}", SIZE),
            axis="busy",
        ),
        rows(
            "Sizes in figures",
            "Energy, mean power and mean speed in the time range.",
            {
                "energy": (f"sum by (run, stage, trial) (max by (run, stage, trial, rank) ({joules}))", JOULES),
                "mean power": (f"avg_over_time({WATTS_OF}[$__range])", WATTS),
                "structures/s": (f"avg_over_time({SPEED_OF}[$__range])", COUNT),
                "J/structure": (each, NUMBER),
            },
            span=12,
        ),
    ]


def build() -> grafana.Dashboard:
    """The dashboard; it opens on the stage that `wattier bench power` writes."""
    choices = variables("run", "stage")
    choices[1].current(VariableOption(selected=True, text=["power"], value=["power"]))
    about = "Power of models of several sizes side by side; the stage `power` is what wattier bench power trains."
    return dashboard("models", about, choices, {"Sizes": _panels()})
