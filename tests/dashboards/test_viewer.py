"""The viewer of dashboards cannot be run in the gate; that it fits the dashboards can be seen from its files."""

import json
import re
from pathlib import Path

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
VIEWER = DASHBOARDS / "viewer"


def test_its_parts_are_of_the_grafana_that_the_dashboards_are_for():
    (grafana,) = re.findall(r"grafana/grafana:(\S+)", (DASHBOARDS / "compose.yaml").read_text())
    wanted = json.loads((VIEWER / "package.json").read_text())["dependencies"]
    assert {wanted[f"@grafana/{name}"] for name in ("data", "schema", "ui")} == {grafana}
    locked = json.loads((VIEWER / "package-lock.json").read_text())["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert not any("resolved" in package for package in locked.values())  # it names no registry
    assert all("integrity" in package for name, package in locked.items() if name)


def test_it_can_draw_every_kind_of_panel():
    (kinds,) = re.findall(r"const KINDS[^{]*\{(.*?)\};", (VIEWER / "src/main.tsx").read_text(), re.DOTALL)
    known = {name.strip('"') for name in re.findall(r'("?[\w-]+"?):', kinds)}
    used = set()
    for path in (DASHBOARDS / "json").glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        used |= {inner["type"] for panel in panels for inner in [panel, *panel.get("panels", [])]}
    assert used
    assert used - {"row"} <= known
