"""How far apart the hyper-parameters of two trials are, so that an ensemble is not one model many times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.encoding import Encoder
from wattier.records import TrialResult
from wattier.space import Space


class Spacing:
    """Distances between trials in the search space, as shares of its diagonal, 0 to 1.

    Each hyper-parameter counts alike: a range by the share of it that lies between two values, on its own scale (the
    logarithm where `log` is set), other choices by 0 or 1. The distance is their root mean square.
    """

    def __init__(self, space: Space, trials: Sequence[TrialResult]) -> None:
        varied = {name: parameter for name, parameter in space.items() if _varies(parameter)}
        self._diagonal = math.sqrt(len(varied))
        rows = Encoder(varied).encode([trial.params for trial in trials])
        self._rows = {trial.trial_id: row for trial, row in zip(trials, rows, strict=True)}

    def nearest(self, trial_id: str, others: Sequence[str]) -> tuple[str, float] | None:
        """The nearest of some other trials, and how far away it is; None where there is no other, or no space."""
        if not others or not self._diagonal:
            return None
        there = np.array([self._rows[other] for other in others])
        distances = np.linalg.norm(there - self._rows[trial_id], axis=1) / self._diagonal
        index = int(np.argmin(distances))
        return others[index], float(distances[index])


def _varies(parameter: RangeParameter | ChoiceParameter) -> bool:
    if isinstance(parameter, ChoiceParameter):
        return len(parameter.choices) > 1
    return parameter.low < parameter.high
