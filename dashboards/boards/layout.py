"""What every dashboard has: its variables, its rows, and the links from a series to where more is said of it."""

from __future__ import annotations

from collections.abc import Iterable

from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableHide,
    VariableOption,
    VariableRefresh,
)

from boards.panels import SOURCE, AnyPanel, Link

_WHICH = "var-run=${__field.labels.run}&var-stage=${__field.labels.stage}&var-trial=${__field.labels.trial}"
TO_TRIAL = Link("Trial", f"/d/wattier-trial?{_WHICH}&${{datasource:queryparam}}&${{__url_time_range}}")
TO_REPORT = Link("Row in the report", "${report}#trial-${__field.labels.stage}-${__field.labels.trial}")
TO_RAY = Link("Ray dashboard", "${ray_dashboard}")
TO_HOST = Link(
    "Host", "/d/wattier-fleet?var-host=${__field.labels.instance}&${datasource:queryparam}&${__url_time_range}"
)

_INFO = '{__name__=~"wattier_(campaign|trial)_info"%s}'


def _choice(name: str, query: str, *, many: bool, hidden: bool = False) -> grafana.QueryVariable:
    choice = grafana.QueryVariable(name).label(name).datasource(SOURCE)
    choice.query({"query": query, "refId": name})
    choice.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    if many:
        choice.current(VariableOption(selected=True, text=["All"], value=["$__all"])).multi(True)
        choice.include_all(True).all_value(".*")
    if hidden:
        choice.hide(VariableHide.HIDE_VARIABLE)
    return choice


def variables(*names: str, many: bool = True) -> list[grafana.QueryVariable]:
    """The choices of a dashboard, in the order in which one narrows the next.

    many: whether several may be chosen; otherwise one is, the first there is.
    """
    run = 'run=~"$run"'
    queries = {
        "run": f"label_values({_INFO % ''}, run)",
        "stage": f"label_values(wattier_trial_info{{{run}}}, stage)",
        "trial": f'label_values(wattier_trial_info{{{run}, stage=~"$stage"}}, trial)',
        "host": "label_values(wattier_build_info, instance)",
    }
    chosen = [_choice(name, queries[name], many=many) for name in names]
    if "run" in names:  # only links use them
        for name in ("ray_dashboard", "report"):
            query = f"label_values(wattier_campaign_info{{{run}}}, {name})"
            chosen.append(_choice(name, query, many=False, hidden=True))
    return chosen


def dashboard(
    name: str,
    description: str,
    choices: Iterable[grafana.QueryVariable],
    sections: dict[str, list[AnyPanel]],
) -> grafana.Dashboard:
    """A dashboard: rows of panels, by the row's title."""
    built = grafana.Dashboard(f"Wattier {name}").uid(f"wattier-{name}").description(description)
    built.tags(["wattier"]).timezone("browser").refresh("10s").time("now-1h", "now").editable()
    built.tooltip(DashboardCursorSync.CROSSHAIR)
    others = grafana.DashboardLink("Wattier").type(DashboardLinkType.DASHBOARDS).tags(["wattier"])
    built.link(others.as_dropdown(False).include_vars(True).keep_time(True))
    built.with_variable(grafana.DatasourceVariable("datasource").label("datasource").type("prometheus"))
    for choice in choices:
        built.with_variable(choice)
    number = 0
    for title, panels in sections.items():
        number += 1
        built.with_row(grafana.Row(title).id(number))
        for panel in panels:
            number += 1
            built.with_panel(panel.id(number))
    return built
