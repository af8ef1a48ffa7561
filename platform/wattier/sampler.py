"""The seam between a search and what chooses its next hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from wattier.multifidelity import MultiFidelitySampler, Observation
from wattier.records import Params

Cost = Callable[[Sequence[Params]], NDArray[np.float64]]  # of full trials of this stage, J


class Point(NamedTuple):
    """A trial that finished its stage, and the values it is compared by."""

    params: Params
    values: tuple[float, ...]


class Known(NamedTuple):
    """All that is known when a trial is chosen.

    Attributes:
        observations: of this stage, finished or not, and of all stages before, each at its fidelity.
        earlier: what finished in the stages before, the last one last.
        finished: what finished in this stage.
        pending: what runs, or waits to.
        lost: what diverged, failed, or left nothing to compare it by, also in earlier stages: not to be tried again.
        cost: projected joules, where there is a model of them.
        affordable_joules: what a trial may cost, None = anything.
    """

    observations: Sequence[Observation] = ()
    earlier: Sequence[Point] = ()
    finished: Sequence[Point] = ()
    pending: Sequence[Params] = ()
    lost: Sequence[Params] = ()
    cost: Cost | None = None
    affordable_joules: float | None = None


class Ended(NamedTuple):
    """How a trial of this stage ended.

    Attributes:
        values: what it is compared by; None where it cannot be compared.
        limit_ratios: what it used of each limit; above 1 = too much.
        curve: loss (or weighted sum) by epoch, of a trial with one objective.
    """

    trial_id: str
    params: Params
    status: Literal["complete", "pruned", "failed"]
    values: tuple[float, ...] | None
    limit_ratios: Mapping[str, float]
    curve: Mapping[int, float]


class Sampler(Protocol):
    """Chooses hyper-parameters. One thread calls it.

    Attributes:
        repeats: whether it may suggest what has been tried while there is something else.
    """

    repeats: bool

    def suggest(self, trial_id: str, known: Known) -> Params | None:
        """Hyper-parameters for a new trial; None when the space holds nothing that was not tried."""

    def take(self, trial_id: str, params: Params) -> None:
        """Hear of a trial that somebody else chose: promoted, or taken up again."""

    def drop(self, trial_id: str) -> None:
        """Hear that a suggestion is not tried."""

    def ended(self, trial: Ended) -> None:
        """Hear how a trial ended, in this process or before."""


class Surrogate:
    """The multi-fidelity sampler: all it needs is what is known at the moment."""

    repeats = False  # asked again about the same, it suggests the same

    def __init__(self, sampler: MultiFidelitySampler) -> None:
        self.sampler = sampler

    def suggest(self, trial_id: str, known: Known) -> Params | None:  # noqa: ARG002
        """See `Sampler.suggest`."""
        return self.sampler.suggest(
            known.observations,
            pending=known.pending,
            lost=known.lost,
            cost=known.cost,
            affordable_joules=known.affordable_joules,
        )

    def goes_on(self, known: Known, trial: Sequence[Observation]) -> bool:
        """Whether a running trial, which `known` leaves out, is worth its remaining joules."""
        return self.sampler.goes_on(known.observations, trial, pending=known.pending, lost=known.lost, cost=known.cost)

    def take(self, trial_id: str, params: Params) -> None:
        """Nothing to do: it is pending."""

    def drop(self, trial_id: str) -> None:
        """Nothing to do."""

    def ended(self, trial: Ended) -> None:
        """Nothing to do: it is an observation."""
