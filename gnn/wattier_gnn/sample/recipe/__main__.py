"""``python -m wattier_gnn.sample.recipe``: label geometries, then write the sample from them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from wattier_gnn.sample import SAMPLE_SOURCES
from wattier_gnn.sample.recipe.corpus import write_corpus
from wattier_gnn.sample.recipe.labelling import label_source
from wattier_gnn.sample.recipe.source_note import write_source_note
from wattier_gnn.structure import DataError

_LOG = logging.getLogger("wattier_gnn.sample.recipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 1 when the data are not there."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "label":
            for source in options.only:
                label_source(source, options.work, _LOG.info)
        else:
            written = write_corpus(options.work, options.out)
            write_source_note(options.out, written)
            for item in written:
                _LOG.info("%s: %d frames written, %d left out", item.source, len(item.frames), item.n_left_out)
    except DataError as error:
        _LOG.error("%s", error)  # no traceback: the message is for the user
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wattier_gnn.sample.recipe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    label = commands.add_parser("label", help="label geometries (about an hour; needs the extra [labels])")
    label.add_argument("--work", type=Path, required=True, help="folder of the labelled frames")
    label.add_argument("--only", type=_sources, default=SAMPLE_SOURCES, help="sources, separated by commas")
    write = commands.add_parser("write", help="write the five layouts and SOURCE.md from labelled frames")
    write.add_argument("--work", type=Path, required=True, help="folder of the labelled frames")
    write.add_argument("--out", type=Path, required=True, help="folder that becomes the sample's data")
    return parser


def _sources(text: str) -> tuple[str, ...]:
    sources = tuple(text.split(","))
    unknown = [source for source in sources if source not in SAMPLE_SOURCES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown source {unknown[0]!r}; must be of {','.join(SAMPLE_SOURCES)}")
    return sources


if __name__ == "__main__":
    raise SystemExit(main())
