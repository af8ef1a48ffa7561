"""What several files ask of the dashboards and of databases."""

import contextlib
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "dashboards"
NAMES = ("campaign", "trial", "fleet", "models")
DEBIAN = "Debian: apt-get install --no-install-recommends"


def tool(name, package):
    """The path of a program; the test is skipped without it, which is a failure in the gate."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed ({DEBIAN} {package})")
    return path


def board(name):
    return json.loads((FOLDER / "json" / f"{name}.json").read_text())


def panels(name):
    """Panels with queries; a row has none."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def may_be_empty(panel):
    return "Empty" in panel["description"]


def plain(expr, seconds, chosen=None):
    """An expression as Grafana sends it; chosen: variable -> value, All where there is none."""
    macros = {"$__range_s": str(seconds), "$__range": f"{seconds}s", "$__rate_interval": "1m", "$__interval": "15s"}
    for macro, value in macros.items():
        expr = expr.replace(macro, value)
    return re.sub(r"\$(run|stage|trial|host)\b", lambda match: (chosen or {}).get(match[1], ".*"), expr)


class Database:
    """Something that answers PromQL over HTTP."""

    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=20) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
            error.close()
        return json.loads(body)

    def ask(self, expr, at=None):
        """The answer to an instant query, now or at a time."""
        answer = self.get("/api/v1/query", query=expr, **({} if at is None else {"time": f"{at:.3f}"}))
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    def ask_range(self, expr, start, end, step=1):
        """The answer to a range query."""
        times = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": step}
        answer = self.get("/api/v1/query_range", query=expr, **times)
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    def until(self, expr, good=bool, seconds=60.0):
        """The answer once it is good, or as it is then: a busy machine answers late."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                found = self.ask(expr)
                if good(found):
                    return found
            time.sleep(0.2)
        return self.ask(expr)
