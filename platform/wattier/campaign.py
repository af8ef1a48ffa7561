"""Tells the node's exporter how the campaign stands, for as long as a phase of it lasts.

A thread of its own looks at the run directory, as the mirror's does: whatever fails there, the run goes on, and never
waits. It takes at most a twentieth of one core.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from wattier.campaign_standing import CampaignStanding
from wattier.config import RunConfig
from wattier.costs import Costs, mean_joules
from wattier.funnel import STOPPED_SHARE
from wattier.rundir import RunDir
from wattier_telemetry.campaign import CampaignRegistration

PERIOD_SECONDS = 1.0
MOST_OF_A_CORE = 0.05
CLOSE_SECONDS = 5.0

log = logging.getLogger(__name__)


@contextmanager
def campaign_shown(
    run: RunDir,
    config: RunConfig,
    phase: str,
    *,
    costs: Costs | None = None,
    ray_dashboard: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Show the campaign to the node's exporter for the length of the block.

    Args:
        run: where its records are.
        config: its config.
        phase: what the driver does: data, search, full training, evaluation.
        costs: what knows the price of a trial before any of its stage has ended.
        ray_dashboard: URL of Ray's own dashboard, once there is one.
    """
    told = _Told(run, config, phase, _expected(config, costs), ray_dashboard)
    told.thread.start()
    try:
        yield
    finally:
        told.close()


def _expected(config: RunConfig, costs: Costs | None) -> dict[str, float | None]:
    """Joules of one trial of each stage, stopped ones included; asked once, since it takes a while."""
    expected: dict[str, float | None] = {}
    for section in config.search.stages:
        share = 1.0 if section.reduction_factor is None else STOPPED_SHARE
        each = None if costs is None else mean_joules(config, costs, section)
        expected[section.name] = None if each is None else share * each
    return expected


class _Told:
    """The thread, and the file that it writes."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        phase: str,
        expected: Mapping[str, float | None],
        ray_dashboard: Callable[[], str | None],
    ) -> None:
        self._phase, self._ray_dashboard = phase, ray_dashboard
        self._standing = CampaignStanding(run, config, time.time(), expected)
        self._written: CampaignRegistration | None = None
        self._closing = threading.Event()
        self._has_warned = False
        self.thread = threading.Thread(target=self._work, name="campaign", daemon=True)

    def close(self) -> None:
        """Tell how it ended, and withdraw; a disk that hangs is not waited for."""
        self._closing.set()
        self.thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                began = time.thread_time()
                self._tell()
                self._closing.wait(max(PERIOD_SECONDS, (time.thread_time() - began) / MOST_OF_A_CORE))
        finally:
            self._withdraw()

    def _tell(self) -> None:
        try:
            registration = self._standing.look(self._phase, time.time())
            self._written = replace(registration, ray_dashboard=self._ray_dashboard())
            self._written.write()
        except Exception:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            log.log(level, "the campaign is not shown to the exporter; the run goes on", exc_info=True)

    def _withdraw(self) -> None:
        try:
            if self._written is not None:
                self._written.withdraw()
        except OSError:
            log.debug("the campaign's registration could not be removed", exc_info=True)
