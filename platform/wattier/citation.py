"""``CITATION.cff`` of a release: Wattier, the paper whose funnel it implements, and the data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_DOI = re.compile(r"doi:(10\.[0-9]{4,}/\S+)")
PAPER: dict[str, Any] = {
    "type": "article",
    "title": "Scalable training of trustworthy and energy-efficient predictive graph foundation models for atomistic "
    "materials modeling: a case study with HydraGNN",
    "authors": [
        {"family-names": family, "given-names": given}
        for family, given in (
            ("Lupo Pasini", "Massimiliano"), ("Choi", "Jong Youl"), ("Mehta", "Kshitij"), ("Zhang", "Pei"),
            ("Rogers", "David"), ("Bae", "Jonghyun"), ("Ibrahim", "Khaled"), ("Aji", "Ashwin"),
            ("Schulz", "Karl W."), ("Polo", "Jorda"), ("Balaprakash", "Prasanna"),
        )
    ],
    "journal": "The Journal of Supercomputing",
    "volume": 81,
    "start": 618,
    "year": 2025,
    "doi": "10.1007/s11227-025-07029-9",
}  # fmt: skip


def citation_file(name: str, wattier_version: str, citations: Mapping[str, str]) -> str:
    """The text of a CITATION.cff.

    Args:
        name: of the release.
        wattier_version: that made it.
        citations: what to cite for each source of data.
    """
    return yaml.safe_dump(
        {
            "cff-version": "1.2.0",
            "message": f"If you use the release {name}, please cite Wattier, which made it, and what is listed here.",
            "title": "Wattier: energy-aware search for graph foundation models of atomistic materials",
            "type": "software",
            "version": wattier_version,
            "license": "BSD-3-Clause",
            "authors": [{"name": "The Wattier developers"}],
            "references": [PAPER, *(_of_data(source, text) for source, text in citations.items())],
        },
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )


def _of_data(source: str, citation: str) -> dict[str, Any]:
    """A reference in one line ("Smith et al., Sci. Data ...") as far as the format has fields for what it says."""
    doi = _DOI.search(citation)
    return {
        "type": "data",
        "title": f"The data that the source {source} was read from",
        "authors": [{"name": citation.partition(",")[0]}],
        "notes": citation,
        **({"doi": doi.group(1)} if doi else {}),
    }
