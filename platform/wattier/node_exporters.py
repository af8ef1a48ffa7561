"""An exporter on every node that runs trials, for as long as a command lasts.

It lives outside the trials' processes, so that a trial that is killed is measured to its end. Ray's workers import
this file alone: it stays light, and knows neither Ray nor torch.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wattier_telemetry.exporter import RunningExporter, ServeOptions, start
from wattier_telemetry.registration import ENVIRONMENT_VARIABLE
from wattier_telemetry.source import SourceUnavailable, open_source

if TYPE_CHECKING:
    from wattier.config import TelemetrySection
    from wattier.rundir import RunDir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExporterPlan:
    """What every node's exporter is asked to do, in plain picklable values.

    registry: folder where trials register on each node; None = each node's own default, which is the same for the
    exporter and the trials, since both are processes of one Ray node and so of one user and one environment.
    """

    run_dir: str
    source: str
    address: str
    port: int
    allow: tuple[str, ...]
    registry: str | None

    @classmethod
    def of(cls, run: RunDir, telemetry: TelemetrySection) -> ExporterPlan | None:
        """The plan of a run; None = no exporter is wanted."""
        if not telemetry.exporter:
            return None
        return cls(
            str(run.path),
            telemetry.source,
            telemetry.exporter_address,
            telemetry.exporter_port,
            tuple(telemetry.exporter_allow),
            registry_of_command(),
        )

    @property
    def targets(self) -> Path:
        """Where Prometheus finds the exporters: one file a node, there while its exporter is."""
        return Path(self.run_dir) / "telemetry" / "targets"

    def options(self, host: str) -> ServeOptions:
        """The telemetry's own words for it."""
        # A path may hold a comma, which parts names elsewhere.
        replay = self.source.startswith("replay:")
        return ServeOptions(
            sources=(open_source(self.source),) if replay else self.source,
            address=self.address,
            port=self.port,
            allow=self.allow,
            spool=Path(self.run_dir) / "telemetry" / host,
            discovery=self.targets / f"{host}.json",
        )


class Outcome(NamedTuple):
    """What became of one node's exporter: where it answers, or why there is none."""

    host: str
    url: str | None
    problem: str | None


class NodeExporter:
    """The exporter of the node where this is made, in threads of this process. That it cannot start is no error."""

    def __init__(self, plan: ExporterPlan) -> None:
        use_registry(plan.registry)
        self.host = socket.gethostname()
        self._running: RunningExporter | None = None
        self._problem: str | None = None
        try:
            self._running = start(plan.options(self.host))
        except (OSError, ValueError, ImportError, SourceUnavailable) as error:
            self._problem = f"{plan.address}:{plan.port}: {' '.join(str(error).split())}"

    def outcome(self) -> Outcome:
        """Whether it serves."""
        return Outcome(self.host, self._running.url if self._running else None, self._problem)

    def close(self) -> None:
        """Stop; the joules are saved, and Prometheus is told. Closing twice is harmless."""
        if self._running is not None:
            self._running.close()
            self._running = None


class Nodes(Protocol):
    """The nodes that run trials, and how something is kept running on them. A handle is whatever `start` returns."""

    def alive(self) -> Sequence[str]:
        """Ids of the nodes there are now."""

    def start(self, plan: ExporterPlan, node: str) -> Any:
        """Make a `NodeExporter` on a node; returns at once."""

    def ask(self, handles: Mapping[str, Any]) -> Mapping[str, Outcome]:
        """The outcome of each node's exporter; one that does not answer, or is dead, is left out."""

    def stop(self, handles: Sequence[Any]) -> None:
        """Close the exporters, as far as they answer."""


class NodeExporters:
    """One exporter on each node: looked after at the start of each stage, closed with the command."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._plan: ExporterPlan | None = None
        self._handles: dict[str, Any] = {}
        self._told: set[Outcome] = set()

    def ensure(self, plan: ExporterPlan | None) -> None:
        """Start one on every node that has none: nodes that joined, and nodes whose port has become free."""
        if plan is None:
            return
        if self._plan is None:
            self._plan = plan
            self._forget_targets()  # of a run that was killed: the driver has the run directory to itself
        alive = self._nodes.alive()
        serving = {node for node, outcome in self._nodes.ask(self._handles).items() if outcome.url}
        self._drop(set(self._handles) - (serving & set(alive)))
        fresh = {node: self._nodes.start(plan, node) for node in alive if node not in self._handles}
        self._handles |= fresh
        outcomes = self._nodes.ask(fresh)
        for node in fresh:
            self._tell(outcomes.get(node) or Outcome(node, None, "it does not answer yet"))
        self._drop({node for node, outcome in outcomes.items() if not outcome.url})

    def close(self) -> None:
        """Close all; Prometheus is told, also of those that were killed."""
        self._drop(set(self._handles))
        if self._plan is not None:
            self._forget_targets()

    def _drop(self, nodes: set[str]) -> None:
        self._nodes.stop([self._handles.pop(node) for node in sorted(nodes)])

    def _forget_targets(self) -> None:
        if self._plan is not None:
            for path in self._plan.targets.glob("*.json"):
                path.unlink(missing_ok=True)

    def _tell(self, outcome: Outcome) -> None:
        if outcome in self._told:
            return
        self._told.add(outcome)
        if outcome.url:
            log.info("node %s: the exporter serves %s", outcome.host, outcome.url)
        else:
            log.warning(
                "node %s: no exporter of this run (%s). The run goes on, and its bill is complete; if another exporter "
                "of yours serves there, it shows these trials",
                outcome.host,
                outcome.problem,
            )


class ThisNode:
    """The machine and the process we are in."""

    def alive(self) -> Sequence[str]:
        """One node."""
        return [socket.gethostname()]

    def start(self, plan: ExporterPlan, node: str) -> NodeExporter:  # noqa: ARG002  (there is only one)
        """An exporter in threads of this process."""
        return NodeExporter(plan)

    def ask(self, handles: Mapping[str, NodeExporter]) -> Mapping[str, Outcome]:
        """They cannot be dead, or we were."""
        return {node: exporter.outcome() for node, exporter in handles.items()}

    def stop(self, handles: Sequence[NodeExporter]) -> None:
        """Close them."""
        for exporter in handles:
            exporter.close()


def registry_of_command() -> str | None:
    """The folder that whoever typed the command wants trials to register in, if any."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    return str(Path(folder).absolute()) if folder else None


def use_registry(folder: str | None) -> None:
    """Let this process register, or look, where the command said; a Ray worker has another environment than it."""
    if folder is not None:
        os.environ[ENVIRONMENT_VARIABLE] = folder
