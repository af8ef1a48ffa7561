"""The source of the Grafana dashboards: ``python dashboards/build.py`` writes ``dashboards/json/*.json``.

``--check`` writes nothing, names the files that differ from what would be written, and exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from boards import BOARDS

FOLDER = Path(__file__).parent / "json"


def texts() -> dict[str, str]:
    """The dashboards as JSON, by the name of their file."""
    return {
        f"{name}.json": json.dumps(build().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, build in BOARDS.items()
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
