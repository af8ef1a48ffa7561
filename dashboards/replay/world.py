"""What happens in the replayed campaign. Times are seconds since its beginning; all of it scales with its length.

Nothing here was measured: powers, losses and memory are made up, to look like a search on eight H100 and four MI250X.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

RUN, SIZES_RUN = "replayed", "sizes"
HOSTS = ("node0", "node1")
GIB = 2.0**30
RIPPLE = 0.04  # of the power, so that curves do not look drawn with a ruler
STEPS = 120  # lines of a trace in one campaign, beside those where something begins or ends
EDGE_SECONDS = 1e-3  # in which the power goes from one level to the next

LOST, LOST_FROM = "die-1-2-1", 0.53  # the GPU that stops answering for the rest of the campaign, after its trial died
HOT, HOT_FROM, HOT_TO = "gpu-0-2", 0.40, 0.55  # the one that is throttled for heat
CAPPED_FROM, CAPPED_TO = 0.70, 0.90  # when the power cap of the first host's GPUs acts
IDLE, IDLE_FROM, IDLE_TO = "gpu-0-1", 0.42, 0.52  # allocated, and idle


@dataclass(frozen=True)
class Gpu:
    """A device: a card, or one die of a package."""

    uuid: str
    host: str
    name: str
    package: str
    idle_watts: float
    busy_watts: float
    memory_bytes: float
    clock_hertz: float


GPUS = (
    *(Gpu(f"gpu-0-{i}", "node0", "NVIDIA H100", "", 70.0, 620.0, 80 * GIB, 1.98e9) for i in range(8)),
    *(
        Gpu(f"die-1-{i}-{j}", "node1", "AMD Instinct MI250X", f"package-1-{i}", 45.0, 240.0, 64 * GIB, 1.7e9)
        for i in range(4)
        for j in range(2)
    ),
)
GPU = {gpu.uuid: gpu for gpu in GPUS}


@dataclass(frozen=True)
class Trial:
    """A trial: where it runs, from when to when (as shares of the campaign), and how it ends.

    Attributes:
        load: Share of what lies between its GPUs' idle and busy power.
        memory_bytes: That each of its GPUs uses.
    """

    run: str
    stage: str
    name: str
    gpus: tuple[str, ...]
    begins: float
    ends: float
    status: str
    load: float
    memory_bytes: float
    structures_per_second: float
    loss: float  # that it would reach in the end
    epochs: int = 10
    reason: str | None = None

    def progress(self, share: float) -> float:
        """How much of it is done, 0 to 1, at a share of the campaign."""
        return min(1.0, max(0.0, (share - self.begins) / (self.ends - self.begins)))

    def loss_after(self, epoch: int) -> float:
        """Validation loss after an epoch: it falls towards the last one."""
        return self.loss * (1 + 2 * math.exp(-6 * epoch / self.epochs))


TRIALS = (
    Trial(RUN, "scout", "scout-000", ("gpu-0-0",), 0.05, 0.30, "complete", 0.45, 20 * GIB, 900.0, 0.90),
    Trial(RUN, "scout", "scout-001", ("gpu-0-1",), 0.06, 0.30, "complete", 0.60, 25 * GIB, 800.0, 0.74),
    Trial(RUN, "scout", "scout-002", ("gpu-0-2",), 0.07, 0.30, "complete", 0.75, 30 * GIB, 700.0, 0.61),
    Trial(RUN, "scout", "scout-003", ("gpu-0-3",), 0.08, 0.20, "pruned", 0.90, 35 * GIB, 600.0, 1.40),
    Trial(RUN, "scout", "scout-004", ("die-1-0-0",), 0.09, 0.30, "complete", 0.70, 40 * GIB, 500.0, 0.66),
    Trial(RUN, "scout", "scout-005", ("die-1-0-1",), 0.10, 0.15, "failed", 0.80, 45 * GIB, 400.0, 0.70,
          reason="out_of_memory"),
    Trial(RUN, "sift", "sift-000", ("gpu-0-0", "gpu-0-1"), 0.33, 0.60, "complete", 0.70, 41 * GIB, 1500.0, 0.52),
    Trial(RUN, "sift", "sift-001", ("gpu-0-2", "gpu-0-3"), 0.33, 0.62, "complete", 0.80, 52 * GIB, 1300.0, 0.44),
    Trial(RUN, "sift", "sift-002", ("gpu-0-4", "die-1-1-0"), 0.34, 0.58, "complete", 0.75, 38 * GIB, 1100.0, 0.49),
    Trial(RUN, "sift", "sift-003", ("die-1-2-0", LOST), 0.35, 0.50, "failed", 0.85, 47 * GIB, 800.0, 0.47,
          reason="node_lost"),
    Trial(RUN, "final", "final-000", tuple(f"gpu-0-{i}" for i in range(8)), 0.66, 0.94, "complete", 1.0, 71.5 * GIB,
          5200.0, 0.31, epochs=40),
    Trial(RUN, "final", "final-001", ("die-1-0-0", "die-1-0-1", "die-1-1-0", "die-1-1-1"), 0.66, 0.90, "complete", 0.9,
          58 * GIB, 1900.0, 0.36, epochs=40),
    Trial(SIZES_RUN, "power", "SMALL", ("gpu-0-5",), 0.05, 0.62, "complete", 0.30, 9 * GIB, 9000.0, 0.80),
    Trial(SIZES_RUN, "power", "MEDIUM", ("gpu-0-6",), 0.05, 0.62, "complete", 0.65, 28 * GIB, 2100.0, 0.60),
    Trial(SIZES_RUN, "power", "LARGE", ("gpu-0-7",), 0.05, 0.62, "complete", 1.0, 66 * GIB, 180.0, 0.40),
)  # fmt: skip
STAGES = {RUN: {"scout": 6, "sift": 4, "final": 2}, SIZES_RUN: {"power": 3}}
LARGEST_MEMORY_BYTES = 71.5 * GIB


@dataclass(frozen=True)
class World:
    """The campaign at one length.

    Attributes:
        seconds: How long it takes; it happens once.
    """

    seconds: float

    def trial_of(self, uuid: str, share: float) -> Trial | None:
        """Whose a GPU is."""
        return next((t for t in TRIALS if uuid in t.gpus and t.begins <= share < t.ends), None)

    def throttle_reasons(self, uuid: str, share: float) -> tuple[str, ...]:
        """What holds a GPU's clock down."""
        reasons = []
        if uuid == HOT and HOT_FROM <= share < HOT_TO:
            reasons.append("software_thermal")
        if GPU[uuid].host == "node0" and CAPPED_FROM <= share < CAPPED_TO:
            reasons.append("power_cap")
        return tuple(reasons)

    def throttled_seconds(self, uuid: str, share: float) -> dict[str, float]:
        """How long each reason has held it down so far."""
        windows = {"software_thermal": (HOT_FROM, HOT_TO), "power_cap": (CAPPED_FROM, CAPPED_TO)}
        return {
            reason: max(0.0, min(share, end) - begin) * self.seconds if self._ever(uuid, reason) else 0.0
            for reason, (begin, end) in windows.items()
        }

    @staticmethod
    def _ever(uuid: str, reason: str) -> bool:
        return uuid == HOT if reason == "software_thermal" else GPU[uuid].host == "node0"

    def is_idle(self, uuid: str, share: float) -> bool:
        """Whether it does nothing, whosever it is."""
        return self.trial_of(uuid, share) is None or (uuid == IDLE and IDLE_FROM <= share < IDLE_TO)

    def level(self, uuid: str, share: float) -> float:
        """Power without the ripple, W."""
        gpu, trial = GPU[uuid], self.trial_of(uuid, share)
        if trial is None or self.is_idle(uuid, share):
            return gpu.idle_watts
        slowed = 0.6 if "software_thermal" in self.throttle_reasons(uuid, share) else 1.0
        return gpu.idle_watts + slowed * trial.load * (gpu.busy_watts - gpu.idle_watts)

    def power_line(self, uuid: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Times, s, and powers there, W; straight lines between them."""
        return _power_line(self, uuid)

    def joules(self, uuid: str, begin: float, end: float) -> float:
        """Energy between two times, J: the integral of the straight lines; outside of them the power stands."""
        return self._joules_until(uuid, end) - self._joules_until(uuid, begin)

    def _joules_until(self, uuid: str, time: float) -> float:
        times, watts, sums = (*self.power_line(uuid), _running_sums(self, uuid))
        i = bisect_right(times, time) - 1
        if i < 0 or i == len(times) - 1:
            edge = max(i, 0)
            return sums[edge] + watts[edge] * (time - times[edge])
        slope = (watts[i + 1] - watts[i]) / (times[i + 1] - times[i])
        since = time - times[i]
        return sums[i] + watts[i] * since + slope * since**2 / 2

    def trial_joules(self, trial: Trial, until: float = math.inf) -> float:
        """Energy of a trial, all of its ranks, J; until a time, or its end."""
        begin, end = trial.begins * self.seconds, min(until, trial.ends * self.seconds)
        return math.fsum(self.joules(uuid, begin, end) for uuid in trial.gpus) if end > begin else 0.0


@cache
def _power_line(world: World, uuid: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    edges = sorted(_edges(uuid))
    points: dict[float, float] = {}
    for step in range(STEPS + 1):
        share = step / STEPS
        if all(abs(share - edge) > 0.25 / STEPS for edge in edges):
            points[share * world.seconds] = world.level(uuid, share) * (1 + RIPPLE * (-1) ** step)
    for edge in edges:
        points[edge * world.seconds - EDGE_SECONDS] = world.level(uuid, edge - 1e-9)
        points[edge * world.seconds] = world.level(uuid, edge + 1e-9)
    times = tuple(sorted(points))
    return times, tuple(points[time] for time in times)


@cache
def _running_sums(world: World, uuid: str) -> tuple[float, ...]:
    times, watts = _power_line(world, uuid)
    sums = [0.0]
    for (t0, w0), (t1, w1) in pairwise(zip(times, watts, strict=True)):
        sums.append(sums[-1] + (w0 + w1) / 2 * (t1 - t0))
    return tuple(sums)


def _edges(uuid: str) -> set[float]:
    edges = {edge for trial in TRIALS if uuid in trial.gpus for edge in (trial.begins, trial.ends)}
    if uuid == HOT:
        edges |= {HOT_FROM, HOT_TO}
    if uuid == IDLE:
        edges |= {IDLE_FROM, IDLE_TO}
    return edges


HEADER = (
    "time_seconds,device,name,domain,method,package_uuid,power_watts,energy_joules,utilization_ratio,"
    "memory_used_bytes,memory_total_bytes,temperature_celsius,clock_hertz,memory_clock_hertz,power_limit_watts,"
    "ecc_corrected,ecc_uncorrected,throttle_reasons,throttle_seconds"
)


def trace(world: World, host: str, start_seconds: float, rounds: int = 1) -> Iterator[str]:
    """Lines of a recording of one host's GPUs, the campaign again and again; its counters go on."""
    yield HEADER
    for gpu in (gpu for gpu in GPUS if gpu.host == host):
        times, _ = world.power_line(gpu.uuid)
        events = {edge * world.seconds for edge in (HOT_FROM, HOT_TO, CAPPED_FROM, CAPPED_TO)}
        for number in range(rounds):
            for time in sorted({t for t in (*times, *events) if 0 <= t < world.seconds}):
                yield f"{start_seconds + number * world.seconds + time:.4f},{_cells(world, gpu, time, number)}"


def _cells(world: World, gpu: Gpu, time: float, number: int) -> str:
    """All but the time of a line of one round; what counters had counted in the rounds before is in it."""
    share = (time + 1e-9) / world.seconds
    trial, idle = world.trial_of(gpu.uuid, share), world.is_idle(gpu.uuid, share)
    reasons = world.throttle_reasons(gpu.uuid, share)
    held = {reason: number * seconds for reason, seconds in world.throttled_seconds(gpu.uuid, 1.0).items()}
    held = {reason: held[reason] + now for reason, now in world.throttled_seconds(gpu.uuid, share).items()}
    watts = _power_at(world, gpu.uuid, time)
    joules = number * world.joules(gpu.uuid, 0.0, world.seconds) + world.joules(gpu.uuid, 0.0, time)
    load = 0.0 if idle or trial is None else trial.load
    clock = gpu.clock_hertz * (0.25 if idle else 0.55 if "software_thermal" in reasons else 0.97 if reasons else 1.0)
    cells = (
        gpu.uuid, gpu.name, "gpu", "counter", gpu.package, f"{watts:.3f}",
        f"{joules:.3f}", f"{0.02 if idle else min(1.0, 0.6 + 0.4 * load):.3f}",
        f"{0.5 * GIB if trial is None else trial.memory_bytes:.0f}", f"{gpu.memory_bytes:.0f}",
        f"{34 + 40 * load + (18 if 'software_thermal' in reasons else 0):.1f}", f"{clock:.0f}", "1600000000",
        "700" if gpu.host == "node0" else "280", f"{number + (share > 0.5)}", "0",
        "|".join(reasons) or "none", "|".join(f"{reason}:{seconds:.3f}" for reason, seconds in held.items()),
    )  # fmt: skip
    return ",".join(cells)


def _power_at(world: World, uuid: str, time: float) -> float:
    times, watts = world.power_line(uuid)
    i = bisect_right(times, time) - 1
    if i < 0 or i == len(times) - 1:
        return watts[max(i, 0)]
    return watts[i] + (time - times[i]) / (times[i + 1] - times[i]) * (watts[i + 1] - watts[i])
