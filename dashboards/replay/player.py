"""Plays the campaign on loopback: two exporters that read simulated GPUs, and the files that trials and a driver write.

It needs the telemetry alone, so that a container can run it: ``python -m replay.player --folder DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from replay.machines import open_host
from replay.standing import standing
from replay.world import GPU, HOSTS, LARGEST_MEMORY_BYTES, RUN, TRIALS, Trial, World
from wattier_telemetry import TrialRegistration
from wattier_telemetry.exporter import ServeOptions, start
from wattier_telemetry.stopping import stop_on_signals

LEAD_SECONDS = 3.0  # before anything happens, for the exporters and for Prometheus to start
TICK_SECONDS = 0.5
Key = tuple[str, str, str]


class Truth(NamedTuple):
    """What must be found in the answers of a database.

    Attributes:
        joules: Of each trial, as its driver bills it.
        seen_joules: Of each trial, between the moments in which it registered and withdrew.
        memory_bytes: The most that any GPU used.
        throttled_seconds: Device time under each reason.
        seconds: How long the campaign took.
    """

    joules: dict[Key, float]
    seen_joules: dict[Key, float]
    memory_bytes: float
    throttled_seconds: dict[str, float]
    seconds: float


class Player:
    """The exporters, and a thread that plays.

    Args:
        folder: Where registries, traces and the list of exporters lie.
        seconds: Length of the campaign.
        rounds: How often it is played, under a name of its own each time.
        address: Where the exporters listen.
        ports: Of the exporters; 0 = any that is free.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        *,
        rounds: int = 1,
        address: str = "127.0.0.1",
        ports: tuple[int, int] = (0, 0),
    ) -> None:
        self.world, self.folder, self.rounds = World(seconds), folder, rounds
        self.start_seconds = time.time() + LEAD_SECONDS
        self._address, self._ports = address, ports
        self._stop, self._over = threading.Event(), threading.Event()
        self._begun: dict[tuple[int, Key], float] = {}
        self._ended: dict[tuple[int, Key], float] = {}
        self._stack = ExitStack()
        self.urls: list[str] = []
        self._thread = threading.Thread(target=self._play, name="player", daemon=True)

    def start(self) -> None:
        """Start the exporters and the play.

        Raises:
            OSError: If a port is taken.
        """
        rows = []
        with ExitStack() as stack:
            for host, port in zip(HOSTS, self._ports, strict=True):
                source = open_host(self.world, host, self.folder / host, self.start_seconds, self.rounds)
                options = ServeOptions(
                    sources=(source,),
                    address=self._address,
                    port=port,
                    registry=self._registry(host),
                    spool=self.folder / host / "state",
                )
                running = start(options)
                stack.callback(running.close)
                self.urls.append(running.url)
                rows.append({"targets": [f"localhost:{running.port}"], "labels": {"instance": host}})
            self._stack = stack.pop_all()
        self.targets.parent.mkdir(parents=True, exist_ok=True)
        self.targets.write_text(json.dumps(rows), encoding="utf-8")
        self._thread.start()

    @property
    def targets(self) -> Path:
        """The list of the exporters, for Prometheus."""
        return self.folder / "targets" / "replayed.json"

    def wait_until_over(self, timeout_seconds: float) -> bool:
        """Wait until the last round has ended; its driver lives on, and says how it ended."""
        return self._over.wait(timeout_seconds)

    def close(self) -> None:
        """Stop everything."""
        self._stop.set()
        self._thread.join(5.0)
        self._stack.close()

    def truth(self) -> Truth:
        """What happened in the first round."""
        seen = {}
        for trial in TRIALS:
            key = _key(trial)
            begin, end = self._begun[0, key] - self.start_seconds, self._ended[0, key] - self.start_seconds
            seen[key] = sum(self.world.joules(uuid, begin, end) for uuid in trial.gpus)
        held = [self.world.throttled_seconds(uuid, 1.0) for uuid in GPU]
        return Truth(
            {_key(trial): self.world.trial_joules(trial) for trial in TRIALS},
            seen,
            LARGEST_MEMORY_BYTES,
            {reason: sum(seconds[reason] for seconds in held) for reason in held[0]},
            self.world.seconds,
        )

    def _registry(self, host: str) -> Path:
        return self.folder / host / "registry"

    def _play(self) -> None:
        for number in range(self.rounds):
            begin = self.start_seconds + number * self.world.seconds
            while not self._stop.wait(self._pause(begin)):
                now = time.time() - begin
                self._tell(number, begin, now)
                if now >= self.world.seconds and number < self.rounds - 1:
                    standing(self.world, now, begin, _name(RUN, number)).withdraw(self._registry(HOSTS[0]))
                    break
                if now >= self.world.seconds:
                    self._over.set()
            if self._stop.is_set():
                return

    def _pause(self, begin: float) -> float:
        """Until the next tick, or until the next trial begins or ends, whichever comes first."""
        now = time.time() - begin
        events = [share * self.world.seconds for trial in TRIALS for share in (trial.begins, trial.ends)]
        return max(0.0, min([TICK_SECONDS, *(event - now for event in events if event > now)]))

    def _tell(self, number: int, begin: float, now: float) -> None:
        if now < 0:
            return
        for trial in TRIALS:
            key, share = (number, _key(trial)), now / self.world.seconds
            if trial.begins <= share < trial.ends:
                self._register(trial, number, now)
                self._begun.setdefault(key, time.time())
            elif key in self._begun and key not in self._ended:
                for rank, uuid in enumerate(trial.gpus):
                    self._registration(trial, number, rank, uuid, now).withdraw(self._registry(GPU[uuid].host))
                self._ended[key] = time.time()
        standing(self.world, now, begin, _name(RUN, number)).write(self._registry(HOSTS[0]))

    def _register(self, trial: Trial, number: int, now: float) -> None:
        for rank, uuid in enumerate(trial.gpus):
            self._registration(trial, number, rank, uuid, now).write(self._registry(GPU[uuid].host))

    def _registration(self, trial: Trial, number: int, rank: int, uuid: str, now: float) -> TrialRegistration:
        epoch = int(trial.progress(now / self.world.seconds) * trial.epochs)
        return TrialRegistration(
            run=_name(trial.run, number),
            stage=trial.stage,
            trial=trial.name,
            rank=rank,
            pid=os.getpid(),
            device_uuids=(uuid,),
            epoch=epoch,
            epochs=trial.epochs,
            val_loss=trial.loss_after(epoch) if epoch else None,
            structures_per_second=trial.structures_per_second,
            energy_joules=self.world.joules(uuid, trial.begins * self.world.seconds, now),
            method="counter",
        )


def _key(trial: Trial) -> Key:
    return trial.run, trial.stage, trial.name


def _name(run: str, number: int) -> str:
    return run if number == 0 else f"{run}-{number + 1}"


@contextmanager
def playing(player: Player) -> Iterator[Player]:
    """A player at work."""
    player.start()
    try:
        yield player
    finally:
        player.close()


def main() -> int:
    """Play until told to stop."""
    parser = argparse.ArgumentParser(description="Play the campaign to whoever scrapes.")
    parser.add_argument("--folder", type=Path, default=None, help="for registries and traces; default: a temporary one")
    parser.add_argument("--seconds", type=float, default=600.0, help="length of one round")
    parser.add_argument("--rounds", type=int, default=48)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--ports", type=int, nargs=2, default=(9500, 9501))
    options = parser.parse_args()
    stop = stop_on_signals()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        ports = tuple(options.ports)
        player = Player(folder, options.seconds, rounds=options.rounds, address=options.address, ports=ports)
        with playing(player):
            sys.stdout.write("\n".join(player.urls) + "\n")
            sys.stdout.flush()
            stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
