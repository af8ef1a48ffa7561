"""The source of the Grafana dashboards: ``python dashboards/build.py`` writes ``dashboards/json/*.json``.

``--check`` writes nothing, names the files that differ from what would be written, and exits 1 if there are any.
A joule is never the ``increase()`` of a counter here: PromQL extrapolates, and makes 1,500 J of a true 1,200.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    LegendDisplayMode,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TRIAL = "{{run}} {{stage}} {{trial}}"
DEVICE = "{{instance}} {{device}} {{uuid}}"
JOULES, WATTS, BYTES, HERTZ, CELSIUS = "joule", "watt", "bytes", "hertz", "celsius"
RATIO, COUNT, PER_SECOND, LOSS = "percentunit", "short", "suffix: structures/s", "none"


class Query(NamedTuple):
    """What a panel asks Prometheus, and how it names the answer."""

    expr: str
    legend: str = ""


AnyPanel = timeseries.Panel | stat.Panel | bargauge.Panel | table.Panel
PanelT = TypeVar("PanelT", timeseries.Panel, stat.Panel, bargauge.Panel, table.Panel)


def dressed(panel: PanelT, title: str, description: str, unit: str) -> PanelT:
    """What every panel has."""
    panel.title(title).description(description).unit(unit).datasource(SOURCE)
    # Without it the stored JSON has no threshold, and Grafana paints everything above 80 red.
    panel.thresholds(grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(color="green")]))
    return panel


def target(query: Query, index: int, *, instant: bool) -> prometheus.Dataquery:
    """One query of a panel; an instant one looks at the end of the time range only."""
    built = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).datasource(SOURCE)
    built.ref_id(chr(ord("A") + index))
    return built.instant() if instant else built.range()


def curves(
    title: str, description: str, unit: str, *queries: Query, log: bool = False, stacked: bool = False
) -> timeseries.Panel:
    """Curves over time."""
    panel = dressed(timeseries.Panel(), title, description, unit).span(12).height(9)
    panel.line_width(1.5).fill_opacity(40 if stacked else 0)
    panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    scale = common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
    panel = panel.scale_distribution(scale) if log else panel.min(0)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE)
    panel.legend(legend.show_legend(True).calcs(["lastNotNull", "max"]))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for index, query in enumerate(queries):
        panel.with_target(target(query, index, instant=False))
    return panel


def figure(title: str, description: str, unit: str, query: Query) -> stat.Panel:
    """One large figure, as of the end of the time range."""
    panel = dressed(stat.Panel(), title, description, unit).span(6).height(4)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    return panel.no_value("none").with_target(target(query, 0, instant=True))


def bars(title: str, description: str, unit: str, query: Query) -> bargauge.Panel:
    """A bar for each answer, as of the end of the time range."""
    panel = dressed(bargauge.Panel(), title, description, unit).span(12).height(9).min(0)
    panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC).show_unfilled(True)
    panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.CONTINUOUS_BL_PU))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    return panel.with_target(target(query, 0, instant=True))


def rows(title: str, description: str, columns: dict[str, tuple[str, str]]) -> table.Panel:
    """A line for each trial; columns: name -> (expression, unit)."""
    panel = dressed(table.Panel(), title, description, COUNT).span(24).height(9)
    for index, (name, (expr, unit)) in enumerate(columns.items()):
        panel.with_target(target(Query(expr), index, instant=True).format(PromQueryFormat.TABLE))
        panel.override_by_name(name, [DynamicConfigValue(id_val="unit", value=unit)])
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    names = {f"Value #{chr(ord('A') + index)}": name for index, name in enumerate(columns)}
    columns_only = {"excludeByName": {"Time": True}, "renameByName": names}
    return panel.with_transformation(DataTransformerConfig(id_val="organize", options=columns_only))


def trial(metric: str) -> str:
    """A trial's newest value; it may be on two nodes for a moment when it is retried elsewhere."""
    return f'max by (run, stage, trial) ({metric}{{run=~"$run"}})'


def trial_joules(counter: str) -> str:
    """A trial's joules: summed over ranks, each once though it may have moved to another node."""
    return f"sum by (run, stage, trial) (max by (run, stage, trial, rank) ({counter}))"


def running() -> str:
    """1 for each running trial, however many ranks and devices it has."""
    return 'group by (run, stage, trial) (wattier_trial_info{run=~"$run"})'


def campaign_panels() -> Iterator[AnyPanel]:
    """The search: what runs, how it learns, what it costs."""
    counter = 'wattier_trial_metered_joules_total{run=~"$run"}'
    # The last value in the time range, so that trials that ended are there too.
    energy, last_energy = trial_joules(counter), trial_joules(f"last_over_time({counter}[$__range])")
    yield figure("Trials running", "Trials with a live process on some node.", COUNT, Query(f"count({running()})"))
    yield figure(
        "Trial energy",
        "All trials seen in the time range, each by its counter's last value. The run directory holds the bill.",
        JOULES,
        Query(f"sum({last_energy})"),
    )
    speed = trial("wattier_trial_structures_per_second")
    yield figure("Training speed", "Structures a second, all running trials.", PER_SECOND, Query(f"sum({speed})"))
    nodes = 'count(group by (instance) (wattier_trial_info{run=~"$run"}))'
    yield figure("Nodes with trials", "Exporters that see a trial.", COUNT, Query(nodes))
    by_stage = Query(f"count by (run, stage) ({running()})", "{{run}} {{stage}}")
    yield curves("Running trials by stage", "How full the cluster is.", COUNT, by_stage, stacked=True)
    loss, epoch = trial("wattier_trial_val_loss"), trial("wattier_trial_epoch")
    yield curves(
        "Validation loss by trial",
        "Log scale. Compare within one stage only: stages differ in data and epochs.",
        LOSS,
        Query(loss, TRIAL),
        log=True,
    )
    yield curves("Epochs finished by trial", "A flat line is a trial that hangs.", COUNT, Query(epoch, TRIAL))
    yield curves("Structures per second by trial", "Training speed of each trial.", PER_SECOND, Query(speed, TRIAL))
    yield curves("Energy so far by trial", "All ranks of a trial together.", JOULES, Query(energy, TRIAL))
    yield bars(
        "Energy by trial",
        "Last value of each trial's counter in the time range, trials that ended included.",
        JOULES,
        Query(f"sort_desc({last_energy})", TRIAL),
    )
    yield rows(
        "Running trials",
        "Epoch, loss, energy and speed of each trial that runs now.",
        {
            "epoch": (epoch, COUNT),
            "validation loss": (loss, LOSS),
            "energy": (energy, JOULES),
            "structures per second": (speed, PER_SECOND),
        },
    )


def device(metric: str, *conditions: str) -> str:
    """A device's own series."""
    return metric + "{" + ", ".join(['instance=~"$instance"', *conditions]) + "}"


def fleet_panels() -> Iterator[AnyPanel]:
    """The machines: power, memory, and what goes wrong."""
    power = device("wattier_power_watts")
    yield figure("Power", "All devices together.", WATTS, Query(f"sum({power})"))
    yield figure("Devices", "Devices that tell their power.", COUNT, Query(f"count(group by (uuid) ({power}))"))
    up = device("up", 'job="wattier"')
    yield figure("Exporters down", "Nodes whose exporter does not answer.", COUNT, Query(f"count({up}) - sum({up})"))
    errors = device("wattier_read_errors_total")
    yield figure("Read errors", "Failed readings since the exporters started.", COUNT, Query(f"sum({errors})"))
    yield curves(
        "Power by device",
        "NVML's power is a 1 s mean. An MI250X is one device of two dies.",
        WATTS,
        Query(power, DEVICE),
    )
    used, total = device("wattier_memory_used_bytes"), device("wattier_memory_total_bytes")
    yield curves(
        "Device memory (HBM) used and total",
        "Near the total, the next larger batch fails.",
        BYTES,
        Query(used, f"used {DEVICE}"),
        Query(total, f"total {DEVICE}"),
    )
    busy = device("wattier_utilization_ratio")
    yield curves("Utilisation by device", "Share of time with work; not how well.", RATIO, Query(busy, DEVICE))
    heat = device("wattier_temperature_celsius")
    yield curves("Temperature by device", "Hottest core sensor.", CELSIUS, Query(heat, DEVICE))
    compute, memory = device("wattier_clock_hertz"), device("wattier_memory_clock_hertz")
    yield curves(
        "Clocks by device",
        "A compute clock that sags under load is throttled.",
        HERTZ,
        Query(compute, f"compute {DEVICE}"),
        Query(memory, f"memory {DEVICE}"),
    )
    yield from _trouble_panels(errors)


def _trouble_panels(errors: str) -> Iterator[AnyPanel]:
    throttled = device("wattier_throttled", 'reason!="none"')
    reasons = f"sum by (instance, uuid, reason) ({throttled})"
    yield curves(
        "Throttled by reason",
        "1 while the reason holds the clock down. A power cap under full load is how the device is meant to work.",
        COUNT,
        Query(reasons, "{{reason}} {{instance}} {{uuid}}"),
        stacked=True,
    )
    by_device = f"sum by (instance, uuid, source) ({errors})"
    yield curves(
        "Read errors by device",
        "Failed readings since the exporter started; a rising line is a device in trouble.",
        COUNT,
        Query(by_device, "{{instance}} {{source}} {{uuid}}"),
    )


def dashboard(name: str, description: str, variable: str, metric: str, panels: Iterator[AnyPanel]) -> grafana.Dashboard:
    """A dashboard with a choice of datasource and of one label."""
    choice = grafana.QueryVariable(variable).label(variable).datasource(SOURCE)
    choice.query({"query": f"label_values({metric}, {variable})", "refId": variable})
    choice.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    choice.current(VariableOption(selected=True, text=["All"], value=["$__all"])).multi(True)
    choice.include_all(True).all_value(".*")
    built = grafana.Dashboard(f"Wattier {name}").uid(f"wattier-{name}").description(description)
    built.tags(["wattier"]).timezone("browser").refresh("10s").time("now-1h", "now").editable()
    built.tooltip(DashboardCursorSync.CROSSHAIR)
    built.with_variable(grafana.DatasourceVariable("datasource").label("datasource").type("prometheus"))
    built.with_variable(choice)
    for number, panel in enumerate(panels, start=1):
        built.with_panel(panel.id(number))
    return built


def texts() -> dict[str, str]:
    """The dashboards as JSON, by the name of their file."""
    built = {
        "campaign": dashboard(
            "campaign", "Trials of a search as they run.", "run", "wattier_trial_info", campaign_panels()
        ),
        "fleet": dashboard("fleet", "Devices of all nodes.", "instance", "wattier_read_errors_total", fleet_panels()),
    }
    return {
        f"{name}.json": json.dumps(one.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, one in built.items()
    }


def drifted(folder: Path) -> list[str]:
    """Names of files that are missing, differ from their source, or have none."""
    wanted = texts()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboards, or say which have drifted."""
    parser = argparse.ArgumentParser(description="Write the Grafana dashboards to dashboards/json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    if parser.parse_args(arguments).check:
        names = drifted(FOLDER)
        for name in names:
            sys.stderr.write(f"{name}: is not what dashboards/build.py makes. Run python dashboards/build.py.\n")
        return 1 if names else 0
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
