"""What every panel has, and the kinds of panels there are."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models import xychart as xy
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BarGaugeNamePlacement,
    BarGaugeSizing,
    HeatmapCellLayout,
    LegendDisplayMode,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOULES, KILOWATT_HOURS, WATTS, BYTES, HERTZ, CELSIUS = "joule", "kwatth", "watt", "bytes", "hertz", "celsius"
RATIO, COUNT, NUMBER, WHEN, SECONDS = "percentunit", "short", "none", "dateTimeFromNow", "s"
PER_SECOND, PER_JOULE, EACH = "suffix: structures/s", "suffix: structures/J", "suffix: J/structure"


class Query(NamedTuple):
    """What a panel asks Prometheus, and how it names the answer."""

    expr: str
    legend: str = ""


class Link(NamedTuple):
    """Where a click on a series leads."""

    title: str
    url: str


AnyPanel = (
    timeseries.Panel | stat.Panel | bargauge.Panel | table.Panel | xychart.Panel | heatmap.Panel | statetimeline.Panel
)
PanelT = TypeVar(
    "PanelT",
    timeseries.Panel,
    stat.Panel,
    bargauge.Panel,
    table.Panel,
    xychart.Panel,
    heatmap.Panel,
    statetimeline.Panel,
)


def dressed(panel: PanelT, title: str, description: str, unit: str) -> PanelT:
    """What every panel has."""
    panel.title(title).description(description).unit(unit).datasource(SOURCE)
    # Without it the stored JSON has no threshold, and Grafana paints everything above 80 red.
    panel.thresholds(grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(color="green")]))
    return panel


def linked(panel: PanelT, *links: Link) -> PanelT:
    """The same panel, whose series lead somewhere; in tables, and points made of them, labels are fields of a row."""
    of_rows = isinstance(panel, table.Panel | xychart.Panel)
    urls = [link.url.replace("__field.labels.", "__data.fields.") if of_rows else link.url for link in links]
    titles = [link.title for link in links]
    made = [grafana.DashboardLink(title).url(url) for title, url in zip(titles, urls, strict=True)]
    panel.data_links([link.target_blank(True) for link in made])
    return panel


def target(query: Query, index: int, *, instant: bool) -> prometheus.Dataquery:
    """One query of a panel; an instant one looks at the end of the time range only."""
    built = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).datasource(SOURCE)
    built.ref_id(chr(ord("A") + index))
    return built.instant() if instant else built.range()


def _legend() -> common.VizLegendOptions:
    """A table whose columns sort, the largest last value first."""
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).show_legend(True)
    return legend.calcs(["lastNotNull", "mean", "max"]).sort_by("Last *").sort_desc(True)


def curves(  # noqa: PLR0913  (most are keywords)
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    axis: str,
    log: bool = False,
    stacked: bool = False,
    span: int = 12,
) -> timeseries.Panel:
    """Curves over time."""
    panel = dressed(timeseries.Panel(), title, description, unit).span(span).height(10)
    panel.line_width(1.5).fill_opacity(40 if stacked else 0).axis_label(axis)
    panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    scale = common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
    panel = panel.scale_distribution(scale) if log else panel.min(0)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    panel.legend(_legend())
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for index, query in enumerate(queries):
        panel.with_target(target(query, index, instant=False))
    return panel


def figure(  # noqa: PLR0913  (two are keywords)
    title: str, description: str, unit: str, query: Query, *, empty: str = "none", bad: float | None = None
) -> stat.Panel:
    """One large figure, as of the end of the time range; `empty` is shown where there is none, red from `bad` on."""
    panel = dressed(stat.Panel(), title, description, unit).span(4).height(4)
    if bad is not None:
        steps = [
            Threshold(color="green"),
            Threshold(color="orange", value=0.8 * bad),
            Threshold(color="red", value=bad),
        ]
        panel.thresholds(grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    return panel.no_value(empty).with_target(target(query, 0, instant=True))


def bars(title: str, description: str, unit: str, query: Query) -> bargauge.Panel:
    """A bar for each answer, as of the end of the time range."""
    panel = dressed(bargauge.Panel(), title, description, unit).span(12).height(10).min(0)
    panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC).show_unfilled(True)
    panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.CONTINUOUS_BL_PU))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.sizing(BarGaugeSizing.MANUAL).min_viz_height(16).max_viz_height(24)
    panel.name_placement(BarGaugeNamePlacement.LEFT).no_value("none")
    return panel.with_target(target(query, 0, instant=True))


def rows(
    title: str, description: str, columns: dict[str, tuple[str, str]], *, span: int = 24, height: int = 10
) -> table.Panel:
    """A line for each set of labels; columns: name -> (expression, unit)."""
    panel = dressed(table.Panel(), title, description, COUNT).span(span).height(height).min_width(70).no_value("none")
    for index, (name, (expr, unit)) in enumerate(columns.items()):
        panel.with_target(target(Query(expr), index, instant=True).format(PromQueryFormat.TABLE))
        panel.override_by_name(name, [_property("unit", unit)])
    return _columns(panel, list(columns))


def _columns(panel: PanelT, names: list[str]) -> PanelT:
    """One table of all queries: a row for each set of labels, a column for each query."""
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    renamed = {f"Value #{chr(ord('A') + index)}": name for index, name in enumerate(names)}
    if len(names) == 1:
        renamed["Value"] = names[0]
    options = {"excludeByName": {"Time": True}, "renameByName": renamed}
    panel.with_transformation(DataTransformerConfig(id_val="organize", options=options))
    return panel


def scatter(title: str, description: str, x: tuple[str, Query, str], y: tuple[str, Query, str]) -> xychart.Panel:
    """A point for each set of labels, coloured by stage; x and y: name, query, unit."""
    panel = dressed(xychart.Panel(), title, description, y[2]).span(12).height(10)
    for index, (_, query, _) in enumerate((x, y)):
        panel.with_target(target(query, index, instant=True).format(PromQueryFormat.TABLE))
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    fields = {"fields": ["stage"], "keepFields": True, "naming": {"asLabels": True}}
    panel.with_transformation(DataTransformerConfig(id_val="partitionByValues", options=fields))
    named = [_property("displayName", "${__field.labels.stage}")]
    return _axes(panel, ("Value #A", *x[::2]), ("Value #B", *y[::2]), named)


def path(title: str, description: str, x: tuple[str, Query, str], y: tuple[str, Query, str]) -> xychart.Panel:
    """One figure against another that both run in time; x and y: name, query, unit."""
    panel = dressed(xychart.Panel(), title, description, y[2]).span(12).height(10)
    for index, (_, query, _) in enumerate((x, y)):
        panel.with_target(target(query, index, instant=False))
    options = {"byField": "Time", "mode": "inner"}
    panel.with_transformation(DataTransformerConfig(id_val="joinByField", options=options))
    return _axes(panel, (x[0], *x[::2]), (y[0], *y[::2]), [])


def _axes(
    panel: xychart.Panel, x: tuple[str, str, str], y: tuple[str, str, str], named: list[DynamicConfigValue]
) -> xychart.Panel:
    """Which field is drawn on which axis; x and y: field, label, unit. named: how the series are called."""

    def by_name(name: str) -> xychart.MatcherConfig:
        return xychart.MatcherConfig().id("byName").options(name)

    series = xychart.XYSeriesConfig().x(xychart.XychartXYSeriesConfigX().matcher(by_name(x[0])))
    series.y(xychart.XychartXYSeriesConfigY().matcher(by_name(y[0])))
    panel.mapping(xy.SeriesMapping.AUTO).series([series]).show(xy.XYShowMode.POINTS)
    panel.override_by_name(x[0], [_property("unit", x[2]), _property("custom.axisLabel", x[1])])
    panel.override_by_name(y[0], [_property("custom.axisLabel", y[1]), *named])
    panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
    return panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.SINGLE))


def _property(name: str, value: object) -> DynamicConfigValue:
    return DynamicConfigValue(id_val=name, value=value)


def heat_map(title: str, description: str, unit: str, query: Query, *, axis: str) -> heatmap.Panel:
    """Counts over time, one series for each row."""
    panel = dressed(heatmap.Panel(), title, description, COUNT).span(24).height(10)
    panel.calculate(False).rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.LE).value("GPUs"))
    panel.filter_values(heatmap.FilterValueRange().le(0.5))  # no colour where no GPU is
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_label(axis)).cell_gap(1)
    panel.color(heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
    panel.show_legend().mode(TooltipDisplayMode.SINGLE).show_y_histogram()
    return panel.with_target(target(query, 0, instant=False))


def time_line(title: str, description: str, *queries: Query) -> statetimeline.Panel:
    """When something was so: 1 is drawn red, 0 green."""
    panel = dressed(statetimeline.Panel(), title, description, NUMBER).span(24).height(10)
    states = {"0": ("free", "green", 0), "1": ("held down", "red", 1)}
    results = {
        value: ValueMappingResult(text=text, color=color, index=index) for value, (text, color, index) in states.items()
    }
    panel.mappings([ValueMap(options=results)]).merge_values(True).row_height(0.8).show_value(VisibilityMode.NEVER)
    panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True)).no_value("none")
    for index, query in enumerate(queries):
        panel.with_target(target(query, index, instant=False))
    return panel
