"""From what members say to how sure they are: a moderated spread, one standard deviation, an interval that covers.

The spread of a few members is itself a poor estimate, near 0 by chance in one of twenty cases where there are three of
them. So it is moderated as the variances of few replicates are (Smyth, Stat. Appl. Genet. Mol. Biol. 3, 3 (2004)): with
d degrees of freedom (members minus one) and a prior spread s0 of the source,

    variance = (d * spread^2 + d0 * s0^2) / (d + d0),    to which what the members' own heads predict is added.

s0 is the median spread of the source's validation structures, by atoms for energies, so that nothing is taken from
errors. Errors of validation give two factors: the one by which a normal standard deviation covers 68.27 %, and the
split-conformal one for the stated coverage c, the ceil((n + 1) c)-th smallest of n ratios |error| / std (Vovk et al.
2005; Angelopoulos and Bates, arXiv:2107.07511, section 1). Both are a source's own where its validation is large enough
to know them (Mondrian), else those of all sources together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.structure import DataError
from wattier_gnn.uncertainty import SMALLEST_STD, fit_scale

PRIOR_DOF = 2.0  # the prior spread counts as much as that of three members
# With n errors, coverage has a standard deviation of sqrt(0.9 * 0.1 / n): 3 % of 100. Forces have dozens a structure.
STRUCTURES_FOR_OWN_FACTORS, STRUCTURES_FOR_OWN_FORCE_FACTORS = 100, 30


class Sureness(NamedTuple):
    """How sure an ensemble is of some numbers; every field has their shape, and is NaN where it is not known.

    std^2 = epistemic^2 + aleatoric^2 where both are known. half_width: of the interval around the number.
    """

    std: Any
    epistemic: Any
    aleatoric: Any
    half_width: Any


class Said(NamedTuple):
    """What calibration needs of n numbers that members gave: energies of structures, or components of forces.

    dof: degrees of freedom of the spread, 0 where there is one member. size [n]: what the number is proportional to,
    atoms of a structure for energies, 1 for forces. aleatoric [n] is NaN where no member predicts its own deviation.
    """

    spread: Any
    dof: float
    aleatoric: Any
    source_index: Any
    size: Any


@dataclass(frozen=True)
class QuantityCalibration:
    """How spread becomes a deviation and an interval, for energies [eV] or forces [eV/Angstrom]; S sources.

    prior_std [S]: by unit of `Said.size`. std_scale, interval_factor [S]: NaN where validation was too small to tell.
    is_own [S]: whether the factors were found on that source alone.
    """

    prior_dof: float
    prior_std: tuple[float, ...]
    std_scale: tuple[float, ...]
    interval_factor: tuple[float, ...]
    is_own: tuple[bool, ...]

    def sureness(self, said: Said) -> Sureness:
        """How sure the ensemble is of some numbers.

        One member without a head of its own has no deviation, but an interval: of one width by size and source.
        """
        epistemic, total = self._parts(said)
        scale, factor = np.array(self.std_scale)[said.source_index], np.array(self.interval_factor)[said.source_index]
        if said.dof <= 0 and np.isnan(said.aleatoric).all():
            unknown = np.full(np.shape(total), np.nan)
            return Sureness(unknown, unknown, unknown, total * factor)
        known = epistemic if said.dof > 0 else np.full(np.shape(total), np.nan)
        return Sureness(total * scale, known * scale, said.aleatoric * scale, total * factor)

    def _parts(self, said: Said) -> tuple[Any, Any]:
        """The moderated spread, and the deviation before it is scaled."""
        prior = np.array(self.prior_std)[said.source_index] * said.size
        if said.dof > 0:
            variance = (said.dof * said.spread**2 + self.prior_dof * prior**2) / (said.dof + self.prior_dof)
            epistemic = np.sqrt(variance)
        else:  # nothing to moderate: what the source's errors usually are stands for what others would say
            epistemic = prior
        return epistemic, np.maximum(np.hypot(epistemic, np.nan_to_num(said.aleatoric)), SMALLEST_STD)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: NaN is null."""
        return {
            "prior_dof": self.prior_dof,
            "prior_std": list(self.prior_std),
            "std_scale": [_or_none(value) for value in self.std_scale],
            "interval_factor": [_or_none(value) for value in self.interval_factor],
            "is_own": list(self.is_own),
        }

    @classmethod
    def from_dict(cls, data: Any, n_sources: int, name: str) -> QuantityCalibration:
        """Inverse of `to_dict`.

        Raises:
            DataError: a number is missing, negative or none; or there are not as many as sources.
        """
        own = _list(data, "is_own", n_sources, name)
        if not all(isinstance(value, bool) for value in own):
            raise DataError(f"calibration of {name}: is_own is {own!r}, but must be true or false for each source.")
        return cls(
            _number(data.get("prior_dof"), f"{name}.prior_dof"),
            tuple(_number(v, f"{name}.prior_std") for v in _list(data, "prior_std", n_sources, name)),
            tuple(_factor(v, f"{name}.std_scale") for v in _list(data, "std_scale", n_sources, name)),
            tuple(_factor(v, f"{name}.interval_factor") for v in _list(data, "interval_factor", n_sources, name)),
            tuple(own),
        )


@dataclass(frozen=True)
class EnsembleCalibration:
    """What an ensemble's numbers are worth: of energies, of forces, and the coverage that intervals aim at.

    coverage: None where there are no intervals, as in what earlier versions released.
    """

    coverage: float | None
    energy: QuantityCalibration
    forces: QuantityCalibration

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"coverage": self.coverage, "energy": self.energy.to_dict(), "forces": self.forces.to_dict()}

    @classmethod
    def from_dict(cls, data: Any, n_sources: int) -> EnsembleCalibration:
        """Inverse of `to_dict`, and of what an earlier version wrote: one factor each for energies and forces.

        Raises:
            DataError: it is neither.
        """
        if not isinstance(data, Mapping):
            raise DataError(f"calibration is a {type(data).__name__}, but must be a mapping. Get the release anew.")
        if "energy_std_scale" in data:
            scales = (_number(data.get(f"{name}_std_scale"), f"{name}_std_scale") for name in ("energy", "forces"))
            energy, forces = (plain_scale(scale, n_sources) for scale in scales)
            return cls(None, energy, forces)
        coverage = None if data.get("coverage") is None else _number(data["coverage"], "coverage")
        if coverage is not None and not 0 < coverage < 1:
            raise DataError(f"calibration: coverage is {coverage:g}, but must lie between 0 and 1.")
        quantities = (QuantityCalibration.from_dict(data.get(n), n_sources, n) for n in ("energy", "forces"))
        return cls(coverage, *quantities)


def plain_scale(scale: float, n_sources: int) -> QuantityCalibration:
    """A calibration that multiplies the plain spread by one factor and knows no intervals."""
    nothing = (math.nan,) * n_sources
    return QuantityCalibration(0.0, (0.0,) * n_sources, (scale,) * n_sources, nothing, (False,) * n_sources)


def fit_calibration(
    errors: Any, said: Said, n_sources: int, coverage: float, own: Sequence[bool]
) -> QuantityCalibration:
    """Find prior spreads and factors on validation errors [n].

    own [S]: whether a source has enough of them to know its own factors.
    """
    single = said.dof <= 0
    # One member has no spread: by source its own typical error takes its place, so that sources can be pooled.
    typical = np.abs(errors) / said.size if single else said.spread / said.size
    pooled = float(np.median(typical)) if len(typical) else 0.0
    prior = [_median(typical[said.source_index == s], pooled) for s in range(n_sources)]
    bare = (1.0,) * n_sources
    unscaled = QuantityCalibration(PRIOR_DOF, tuple(prior), bare, bare, (False,) * n_sources)
    total = unscaled.sureness(said).half_width
    ratios = np.abs(errors) / total
    chosen = [ratios[said.source_index == s] if own[s] else ratios for s in range(n_sources)]
    return QuantityCalibration(
        PRIOR_DOF,
        tuple(prior),
        tuple(fit_scale(r, np.ones(len(r))) if len(r) else math.nan for r in chosen),
        tuple(conformal_quantile(r, coverage) for r in chosen),
        tuple(bool(flag) for flag in own),
    )


def conformal_quantile(scores: Any, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest of n scores; NaN where n is so small that no finite one would cover.

    Of n + 1 exchangeable scores, the last is at most this one with a probability of at least `coverage`.
    """
    n = len(scores)
    # 10 * 0.9 is 9 and must stay so in floating point
    rank = math.ceil((n + 1) * coverage - 1e-9)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= n else math.nan


def _median(values: Any, otherwise: float) -> float:
    return float(np.median(values)) if len(values) else otherwise


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _factor(value: Any, name: str) -> float:
    return math.nan if value is None else _number(value, name)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(f"calibration: {name} is {value!r}, but must be a number, 0 or more. Get the release anew.")
    return float(value)


def _list(data: Any, key: str, length: int, name: str) -> list[Any]:
    values = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(values, list) or len(values) != length:
        raise DataError(f"calibration of {name}: {key} must be a list of {length}, one a source. Get the release anew.")
    return values
