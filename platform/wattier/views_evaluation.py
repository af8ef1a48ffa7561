"""What held-out structures say of the ensemble, beside what the talk published: errors, coverage, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wattier.views import EvaluationInfo

# Mean absolute test errors of the 2024 HydraGNN ensemble, as shown at the SOS27 workshop in March 2025: energy in eV,
# forces in eV/A. The units are the talk's: its code read ANI-1x in hartree, and QM7-X's energy is an outlier whose
# cause was not published.
TALK_ERRORS = {
    "qm7x": (31.91, 0.23), "ani1x": (1.43, 0.02), "mptrj": (0.39, 0.14), "oc20": (0.10, 0.11), "oc22": (0.15, 0.08)
}  # fmt: skip
TALK_NAMES = {"qm7x": "QM7-X", "ani1x": "ANI-1x", "mptrj": "MPtrj", "oc20": "OC20", "oc22": "OC22"}


class SourceErrors(NamedTuple):
    """Errors of one source, and the talk's of the data set of that name."""

    source: str
    metrics: Mapping[str, Any]
    talk_energy_mae_ev: float | None
    talk_force_mae_ev_per_angstrom: float | None


class CoverageRow(NamedTuple):
    """How many held-out values lie inside their interval, and between which bounds a right one would put that.

    band: 99 % of samples of this size would fall inside, were the stated coverage true.
    """

    quantity: str
    source: str
    n: int | None
    target: float | None
    observed: float | None
    band_low: float | None
    band_high: float | None
    mean_half_width: float | None
    unit: str

    @property
    def is_inside(self) -> bool | None:
        """Whether the observed coverage is one that the stated one explains."""
        if self.observed is None or self.band_low is None or self.band_high is None:
            return None
        return self.band_low <= self.observed <= self.band_high


class CalibrationRow(NamedTuple):
    """Figures of one quantity, pooled over sources; None = not told."""

    quantity: str
    unit: str
    part: Mapping[str, Any]


def source_errors(evaluation: EvaluationInfo) -> tuple[SourceErrors, ...]:
    """Each source beside the talk's."""
    return tuple(
        SourceErrors(name, metrics, *TALK_ERRORS.get(name, (None, None)))
        for name, metrics in evaluation.sources.items()
    )


def coverage_rows(evaluation: EvaluationInfo) -> tuple[CoverageRow, ...]:
    """Coverage pooled and by source; () where the evaluation has no intervals."""
    intervals = evaluation.more.get("intervals") or {}
    rows = []
    for quantity, unit in (("energy", "eV"), ("forces", "eV/Å")):
        part = intervals.get(quantity) or {}
        parts = {"all sources": part.get("pooled"), **(part.get("by_source") or {})}
        for source, found in parts.items():
            if found:
                rows.append(
                    CoverageRow(
                        quantity, source, found.get("n"), intervals.get("target"), found.get("observed"),
                        found.get("band_low"), found.get("band_high"), found.get("mean_half_width"), unit,
                    )
                )  # fmt: skip
    return tuple(rows)


def calibration_rows(evaluation: EvaluationInfo) -> tuple[CalibrationRow, ...]:
    """Energy, then forces."""
    units = {"energy": "eV", "forces": "eV/Å"}
    return tuple(
        CalibrationRow(name, str(part.get("unit") or units.get(name, "")), part)
        for name, part in evaluation.calibration.items()
    )
