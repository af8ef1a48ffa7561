"""The search as a whole: what it has done, what it has cost, and when it will be over."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as grafana

from boards.layout import TO_RAY, TO_REPORT, TO_TRIAL, dashboard, variables
from boards.panels import (
    COUNT,
    JOULES,
    KILOWATT_HOURS,
    NUMBER,
    PER_JOULE,
    PER_SECOND,
    RATIO,
    WATTS,
    WHEN,
    AnyPanel,
    Query,
    bars,
    curves,
    figure,
    linked,
    rows,
    scatter,
)

TRIAL = "{{run}} {{stage}} {{trial}}"
CHOSEN = 'run=~"$run", stage=~"$stage"'
STATUSES = ("waiting", "running", "complete", "pruned", "failed", "interrupted")


def campaign(metric: str, *labels: str, last: bool = True, where: str = "") -> str:
    """What the driver says, once however many exporters show it.

    last: of a driver that has ended within the time range, its last word.
    """
    chosen = CHOSEN if "stage" in labels else 'run=~"$run"'
    series = f"wattier_campaign_{metric}{{{chosen}{where}}}"
    return f"max by ({', '.join(('run', *labels))}) ({f'last_over_time({series}[$__range])' if last else series})"


def running() -> str:
    """1 for each running trial, however many ranks and devices it has."""
    return f"group by (run, stage, trial) (wattier_trial_info{{{CHOSEN}}})"


def _now() -> list[AnyPanel]:
    joules = campaign("energy_joules", "phase")
    used = campaign("budget_used_ratio", "budget", where=', resource="joules"')
    planned = campaign("trials_planned", "stage")
    ended = campaign("trials", "stage", "status", where=', status=~"complete|pruned|failed"')
    return [
        figure(
            "Trials running",
            "Trials with a live process on some node.",
            COUNT,
            Query(f"count({running()}) or vector(0)"),
        ),
        figure("Trials ended", "Of those planned.", RATIO, Query(f"sum({ended}) / sum({planned})")),
        figure(
            "Energy spent",
            "All phases, killed and failed trials included: the ledger.",
            JOULES,
            Query(f"sum({joules})"),
        ),
        figure("The same in kWh", "What an electricity bill says.", KILOWATT_HOURS, Query(f"sum({joules}) / 3.6e6")),
        figure(
            "Budget used",
            "The largest share of any budget's joules. Empty without a budget.",
            RATIO,
            Query(f"max({used})"),
            empty="no budget",
            bad=1.0,
        ),
        figure(
            "Expected end",
            "Of what is under way, if joules go on being spent as fast as until now. Empty before anything was spent.",
            WHEN,
            Query(f"1000 * max({campaign('completion_timestamp_seconds', 'forecast', last=False)})"),
            empty="not known",
        ),
    ]


def _trials() -> list[AnyPanel]:
    stages = {status: (campaign("trials", "stage", where=f', status="{status}"'), COUNT) for status in STATUSES}
    ended = ("run", "stage", "trial", "status")
    return [
        curves(
            "Trials by stage and status",
            "They add up to those planned.",
            COUNT,
            Query(campaign("trials", "stage", "status", last=False), "{{run}} {{stage}} {{status}}"),
            axis="trials",
            stacked=True,
        ),
        linked(
            scatter(
                "Loss against energy",
                "Trials that finished their stage, the newest 1,000. Compare within one stage only: stages differ in "
                "data and epochs.",
                ("energy", Query(campaign("trial_joules", *ended[1:], where=', status="complete"')), JOULES),
                ("validation loss", Query(campaign("trial_val_loss", *ended[1:], where=', status="complete"')), NUMBER),
            ),
            TO_TRIAL,
            TO_REPORT,
        ),
        rows(
            "Stages",
            "How the trials of each stage stand, and the best of them.",
            {
                "planned": (campaign("trials_planned", "stage"), COUNT),
                **stages,
                "best loss": (campaign("best_val_loss", "stage"), NUMBER),
                "hypervolume": (campaign("hypervolume", "stage"), NUMBER),
            },
            height=7,
        ),
    ]


def _results() -> list[AnyPanel]:
    return [
        curves(
            "Best loss by stage",
            "Lowest validation loss of the trials that finished the stage.",
            NUMBER,
            Query(campaign("best_val_loss", "stage", last=False), "{{run}} {{stage}}"),
            axis="validation loss",
        ),
        curves(
            "Hypervolume by stage",
            "Area that finished trials dominate in (loss, J). It may fall when a new worst trial moves the reference "
            "point.",
            NUMBER,
            Query(campaign("hypervolume", "stage", last=False), "{{run}} {{stage}}"),
            axis="loss times J",
        ),
        bars(
            "Failures by reason",
            "Trials that failed or diverged. Empty while none has.",
            COUNT,
            Query(f"sort_desc({campaign('failures', 'stage', 'reason')} > 0)", "{{run}} {{stage}} {{reason}}"),
        ),
        linked(
            curves(
                "Validation loss by trial",
                "Of trials that run, on a log scale. Compare within one stage only.",
                NUMBER,
                Query(f"max by (run, stage, trial) (wattier_trial_val_loss{{{CHOSEN}}})", TRIAL),
                axis="validation loss",
                log=True,
            ),
            TO_TRIAL,
            TO_RAY,
        ),
    ]


def _energy() -> list[AnyPanel]:
    last = f"last_over_time(wattier_trial_metered_joules_total{{{CHOSEN}}}[$__range])"
    by_trial = f"sum by (run, stage, trial) (max by (run, stage, trial, rank) ({last}))"
    return [
        curves(
            "Energy against budget",
            "What is spent, what may be, and what the end is expected to be.",
            JOULES,
            Query(f"sum by (run) ({campaign('energy_joules', 'phase', last=False)})", "{{run}} spent"),
            Query(campaign("budget_joules", "budget", last=False), "{{run}} budget of {{budget}}"),
            Query(campaign("projected_joules", "forecast", last=False), "{{run}} projected for {{forecast}}"),
            axis="energy",
        ),
        curves(
            "Energy by phase",
            "Where the joules went.",
            JOULES,
            Query(campaign("energy_joules", "phase", last=False), "{{run}} {{phase}}"),
            axis="energy",
            stacked=True,
        ),
        rows(
            "Energy by phase, with bounds",
            "Between low and high lies the truth, as far as the meters can say. Of an estimate they say "
            "nothing: both are empty.",
            {
                "energy": (campaign("energy_joules", "phase"), JOULES),
                "low": (campaign("energy_low_joules", "phase"), JOULES),
                "high": (campaign("energy_high_joules", "phase"), JOULES),
            },
            span=12,
        ),
        linked(
            bars(
                "Energy by trial",
                "The 30 largest: last value of each trial's meter in the time range, trials that ended included.",
                JOULES,
                Query(f"topk(30, {by_trial})", TRIAL),
            ),
            TO_TRIAL,
            TO_REPORT,
        ),
    ]


def _speed() -> list[AnyPanel]:
    speed = f"wattier:trial_structures_per_second:max{{{CHOSEN}}}"
    watts = f"wattier:trial_power_watts:sum{{{CHOSEN}}}"
    return [
        curves(
            "Structures per second",
            "Training speed of all running trials together.",
            PER_SECOND,
            Query(f"sum by (run, stage) ({speed})", "{{run}} {{stage}}"),
            axis="training speed",
            stacked=True,
        ),
        curves(
            "Structures per joule",
            "What a joule buys: speed over the power of the trials' parts of their devices. Empty where power is only "
            "estimated.",
            PER_JOULE,
            Query(f"sum by (run, stage) ({speed}) / sum by (run, stage) ({watts})", "{{run}} {{stage}}"),
            axis="training per energy",
        ),
        linked(
            curves(
                "Power by trial",
                "Each trial's part of its devices' power, the 30 largest. Empty where power is only estimated.",
                WATTS,
                Query(f"topk(30, {watts})", TRIAL),
                axis="power",
                stacked=True,
            ),
            TO_TRIAL,
            TO_RAY,
        ),
        linked(
            rows(
                "Running trials",
                "Epoch, loss, energy and speed of each trial that runs now. Empty while none does.",
                {
                    "epoch": (f"max by (run, stage, trial) (wattier_trial_epoch{{{CHOSEN}}})", COUNT),
                    "loss": (f"max by (run, stage, trial) (wattier_trial_val_loss{{{CHOSEN}}})", NUMBER),
                    "energy": (f"max by (run, stage, trial) (wattier:trial_energy_joules:last{{{CHOSEN}}})", JOULES),
                    "structures/s": (f"max by (run, stage, trial) ({speed})", COUNT),
                },
                span=12,
            ),
            TO_TRIAL,
            TO_RAY,
        ),
    ]


def build() -> grafana.Dashboard:
    """The dashboard."""
    sections = {"Now": _now(), "Trials": [*_trials(), *_results()], "Energy": _energy(), "Speed and power": _speed()}
    about = "A search: trials by stage and status, joules against the budget, loss against joules, and when it ends."
    return dashboard("campaign", about, variables("run", "stage"), sections)
