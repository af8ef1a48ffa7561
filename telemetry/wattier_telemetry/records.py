# ruff: noqa: TRY004  (a bad type in a file is bad data, and its reader catches ValueError)
"""What the meter measures: a device, a reading of it, a share of its energy, and a report of shares.

Every unit is in the field's name. ``None`` means "unknown", which is never the same as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from wattier_telemetry.checked_json import checked_number, checked_table

Domain = Literal["gpu", "cpu", "dram", "node"]
Method = Literal["counter", "integrated", "estimated"]
Attribution = Literal["whole", "utilization", "equal"]

DOMAINS: tuple[str, ...] = get_args(Domain)
ATTRIBUTIONS: tuple[str, ...] = get_args(Attribution)
METHODS: tuple[str, ...] = get_args(Method)  # strongest first: a sum is only as good as its weakest part


def weakest(methods: Iterable[Method]) -> Method | None:
    """Return the least trustworthy of some methods, or None if there are none."""
    return max(methods, key=METHODS.index, default=None)


@dataclass(frozen=True, slots=True)
class Device:
    """Something that draws power and can be asked how much.

    Attributes:
        uuid: Unique in the world, not only on this node: reports of many nodes are added by it.
        name: What a person calls it, such as ``NVIDIA H200``.
        domain: ``gpu``, ``cpu``, ``dram`` or ``node``.
        index: Position among the source's devices, counted before any visibility mask.
        method: How ``Reading.energy_joules`` is known, if the device gives it.
        counter_refresh_seconds: Longest time the energy counter may stand still under load, s. 0 = it is exact at
            every reading, or nobody knows better.
        power_average_seconds: Time over which ``Reading.power_watts`` is averaged, s; 0 = instantaneous.
        package_uuid: Package whose one meter the device shares with others, such as both dies of an MI250X. Its
            readings are then its part of the package's, so that the parts add up to what the meter says.
        pci_bus_id: Such as ``00000000:18:00.0``.
        driver_version: Version of the kernel driver.
        vbios_version: Version of the device's firmware.
        serial: Serial number of the board.
    """

    uuid: str
    name: str
    domain: Domain
    index: int
    method: Method = "counter"
    counter_refresh_seconds: float = 0.0
    power_average_seconds: float = 0.0
    package_uuid: str | None = None
    pci_bus_id: str | None = None
    driver_version: str | None = None
    vbios_version: str | None = None
    serial: str | None = None


class ErrorCounts(NamedTuple):
    """Errors of one block of a device since the driver loaded; None = it does not count them."""

    corrected: float | None
    uncorrected: float | None
    deferred: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at one device. A field the device cannot answer is None.

    Attributes:
        time_seconds: Wall clock, seconds since 1970.
        power_watts: Power now, W.
        energy_joules: Ever-growing counter with an arbitrary zero, J. Only differences mean anything.
        utilization_ratio: Share of time busy, 0 to 1.
        memory_utilization_ratio: Share of time the memory controller was busy, 0 to 1.
        memory_used_bytes: Device memory in use, B.
        memory_total_bytes: Device memory there is, B.
        temperature_celsius: Hottest core sensor, degrees Celsius.
        memory_temperature_celsius: Hottest memory sensor, degrees Celsius.
        clock_hertz: Compute clock, Hz.
        memory_clock_hertz: Memory clock, Hz.
        power_limit_watts: Power cap in force, W.
        power_limit_max_watts: Highest power cap the device allows, W.
        ecc_corrected: Memory errors corrected since the driver loaded.
        ecc_uncorrected: Memory errors that could not be corrected.
        decoder_utilization_ratio: Share of time the video decoders were busy, 0 to 1.
        link_read_bytes: Data read over the links to other GPUs, B, ever growing.
        link_written_bytes: Data written over them, B, ever growing.
        compute_units: Compute units there are.
        compute_units_busy: Compute units that processes occupy at the moment.
        errors_by_block: Errors by block of the device; None = it does not tell them apart.
        throttle_reasons: What holds the clock down; empty = nothing does, None = the device cannot say.
        throttle_seconds: For each reason the seconds it has held the clock down, ever growing; None = cannot say.
    """

    time_seconds: float
    power_watts: float | None = None
    energy_joules: float | None = None
    utilization_ratio: float | None = None
    memory_utilization_ratio: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    power_limit_watts: float | None = None
    power_limit_max_watts: float | None = None
    ecc_corrected: float | None = None
    ecc_uncorrected: float | None = None
    decoder_utilization_ratio: float | None = None
    link_read_bytes: float | None = None
    link_written_bytes: float | None = None
    compute_units: float | None = None
    compute_units_busy: float | None = None
    errors_by_block: Mapping[str, ErrorCounts] | None = None
    throttle_reasons: tuple[str, ...] | None = None
    throttle_seconds: Mapping[str, float] | None = None


_SHARE_NUMBERS = (
    "start_seconds",
    "end_seconds",
    "fraction",
    "joules",
    "coverage_ratio",
    "joules_low",
    "joules_high",
)


@dataclass(frozen=True, slots=True)
class Share:
    """The energy that one piece of work owes for one device over one interval.

    Attributes:
        device_uuid: Which device.
        domain: ``gpu``, ``cpu``, ``dram`` or ``node``.
        start_seconds: Wall clock at the start, seconds since 1970.
        end_seconds: Wall clock at the end.
        fraction: Part of the device this work owned, above 0 and up to 1. ``joules`` is already scaled by it.
        joules: Energy, J, or None where the device answered nothing at all.
        method: How the joules are known.
        coverage_ratio: Share of the interval that was truly measured, 0 to 1.
        joules_low: The true energy is not below, J, as far as sampling can tell: the sensor's own calibration is not
            in it. None = no bound stated.
        joules_high: The true energy is not above, J. None = no bound stated.
        attribution: How ``fraction`` is known: ``whole`` device, the device's own figures of process
            ``utilization``, or an ``equal`` part for each.
        throttled_seconds: Time under each throttle reason, s. None = the device cannot say.

    Raises:
        ValueError: If a number is not finite or out of its range.
    """

    device_uuid: str
    domain: Domain
    start_seconds: float
    end_seconds: float
    fraction: float
    joules: float | None
    method: Method
    coverage_ratio: float = 1.0
    joules_low: float | None = None
    joules_high: float | None = None
    attribution: Attribution = "whole"
    throttled_seconds: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what would poison a sum later, where nobody could tell where it came from."""
        for name in _SHARE_NUMBERS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"share of {self.device_uuid}: {name} is {value}, but must be finite")
        if self.end_seconds < self.start_seconds:
            raise ValueError(f"share of {self.device_uuid}: ends {self.end_seconds} before {self.start_seconds}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"share of {self.device_uuid}: fraction is {self.fraction}, but must be in (0, 1]")
        if not 0 <= self.coverage_ratio <= 1:
            raise ValueError(f"share of {self.device_uuid}: coverage_ratio is {self.coverage_ratio}, not in [0, 1]")
        if self.joules is not None and self.joules < 0:
            raise ValueError(f"share of {self.device_uuid}: joules is {self.joules}, but must not be negative")
        low, high = self.joules_low, self.joules_high
        if (low is not None and low < 0) or (low is not None and high is not None and high < low):
            raise ValueError(f"share of {self.device_uuid}: joules is between {low} and {high}, which cannot be")
        if not all(math.isfinite(seconds) and seconds >= 0 for seconds in (self.throttled_seconds or {}).values()):
            raise ValueError(f"share of {self.device_uuid}: throttled_seconds must not be negative or infinite")
        for name, allowed in (("domain", DOMAINS), ("method", METHODS), ("attribution", ATTRIBUTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"share: {name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")

    @property
    def key(self) -> tuple[str, float, float, float]:
        """What makes two shares the same share, so that adding it twice counts once."""
        return (self.device_uuid, self.start_seconds, self.end_seconds, self.fraction)

    @property
    def seconds(self) -> float:
        """Length of the interval, s."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True, slots=True)
class EnergyReport:
    """Energy by share; reports add up over restarts, ranks and nodes, and no share is counted twice.

    Make one with `EnergyReport.of`, which derives the seconds and the coverage from the shares.

    Attributes:
        shares: Sorted by key, no key twice.
        seconds: Wall time under the meter, s: the length of the union of the shares' intervals.
        coverage_ratio: Share of device time truly measured, 0 to 1 (0 for an empty report).
        warnings: What a reader must know before trusting the figures, in order of appearance.
    """

    shares: tuple[Share, ...]
    seconds: float
    coverage_ratio: float
    warnings: tuple[str, ...] = ()

    @classmethod
    def empty(cls) -> EnergyReport:
        """Return the report of nothing, which changes no sum."""
        return cls((), 0.0, 0.0, ())

    @classmethod
    def of(cls, shares: Iterable[Share], warnings: Iterable[str] = ()) -> EnergyReport:
        """Build a consistent report; of two shares with one key the dearer stands (never under-bill)."""
        by_key: dict[tuple[str, float, float, float], Share] = {}
        for share in shares:
            rival = by_key.get(share.key)
            by_key[share.key] = share if rival is None else max(rival, share, key=_rank)
        kept = tuple(by_key[key] for key in sorted(by_key))
        return cls(kept, _union_seconds(kept), _coverage_ratio(kept), tuple(dict.fromkeys(warnings)))

    def __add__(self, other: EnergyReport) -> EnergyReport:
        """Return the union of both reports' shares.

        Do not add a `so_far` to a later report of the same meter: their intervals differ, so both would count.
        """
        if not isinstance(other, EnergyReport):
            return NotImplemented
        return EnergyReport.of(self.shares + other.shares, self.warnings + other.warnings)

    @property
    def joules_by_domain(self) -> dict[str, float]:
        """Energy of each domain in which something was measured, J."""
        parts: dict[str, list[float]] = {}
        for share in self.shares:
            if share.joules is not None:
                parts.setdefault(share.domain, []).append(share.joules)
        # fsum rounds once, so that the order in which reports were added leaves no trace.
        return {domain: math.fsum(parts[domain]) for domain in DOMAINS if domain in parts}

    @property
    def joules(self) -> float | None:
        """Total energy, J, or None if nothing was measured."""
        measured = [share.joules for share in self.shares if share.joules is not None]
        return math.fsum(measured) if measured else None

    @property
    def joules_low(self) -> float | None:
        """The true energy is not below this, J; a share that states no bound counts as it is."""
        return self._sum_of("joules_low")

    @property
    def joules_high(self) -> float | None:
        """The true energy is not above this, J; a share that states no bound counts as it is."""
        return self._sum_of("joules_high")

    @property
    def stated_bounds_joules(self) -> tuple[float | None, float | None]:
        """Both bounds where one is stated and no part is estimated: those of an estimate are of its time, not watts."""
        stated = any(share.joules_low is not None or share.joules_high is not None for share in self.shares)
        return (self.joules_low, self.joules_high) if stated and self.method != "estimated" else (None, None)

    def _sum_of(self, bound: str) -> float | None:
        parts = [share.joules if getattr(share, bound) is None else getattr(share, bound) for share in self.shares]
        known = [part for part in parts if part is not None]
        return math.fsum(known) if known else None

    @property
    def throttled_seconds(self) -> dict[str, float]:
        """Device time under each throttle reason, s; only reasons that acted."""
        total: dict[str, float] = {}
        for share in self.shares:
            for reason, seconds in (share.throttled_seconds or {}).items():
                total[reason] = total.get(reason, 0.0) + seconds
        return {reason: total[reason] for reason in sorted(total) if total[reason] > 0}

    @property
    def throttled_ratio(self) -> float | None:
        """Share of device time under the most frequent throttle reason, 0 to 1; None = no device can say."""
        return self.throttled_ratio_but()

    def throttled_ratio_but(self, *wanted: str) -> float | None:
        """Return the same without reasons that somebody wanted."""
        telling = math.fsum(share.seconds for share in self.shares if share.throttled_seconds is not None)
        seconds = [seconds for reason, seconds in (self.throttled_seconds or {}).items() if reason not in wanted]
        return min(1.0, max(seconds, default=0.0) / telling) if telling > 0 else None

    @property
    def method(self) -> Method | None:
        """The weakest method among the measured shares, or None if nothing was measured."""
        return weakest(share.method for share in self.shares if share.joules is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "shares": [asdict(share) for share in self.shares],
            "seconds": self.seconds,
            "coverage_ratio": self.coverage_ratio,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> EnergyReport:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If a key is missing or unknown, a type is wrong, or a number is not finite.
        """
        table = checked_table(data, "energy report", required={f.name for f in fields(cls)})
        if not isinstance(table["shares"], list):
            raise ValueError("energy report: shares must be a list")
        shares = tuple(_share(item, f"shares[{i}]") for i, item in enumerate(table["shares"]))
        warnings = table["warnings"]
        if not isinstance(warnings, list) or not all(isinstance(item, str) for item in warnings):
            raise ValueError("energy report: warnings must be a list of strings")
        seconds = checked_number(table, "seconds", "energy report")
        return cls(shares, seconds, checked_number(table, "coverage_ratio", "energy report"), tuple(warnings))


def _rank(share: Share) -> tuple[Any, ...]:
    """Order rivals for one key by what they cost, then the more doubtful first, so that addition commutes."""
    low, high = share.joules_low, share.joules_high
    throttled = sorted((share.throttled_seconds or {}).items())
    return (
        -1.0 if share.joules is None else share.joules,
        METHODS.index(share.method),
        -share.coverage_ratio,
        math.inf if high is None else high,
        math.inf if low is None else -low,
        share.attribution,
        share.throttled_seconds is not None,
        throttled,
    )


def _union_seconds(shares: Iterable[Share]) -> float:
    """Return the length of the union of the shares' intervals, s."""
    total, reached = 0.0, -math.inf
    for start, end in sorted((share.start_seconds, share.end_seconds) for share in shares):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _coverage_ratio(shares: tuple[Share, ...]) -> float:
    """Return the mean coverage of the shares, weighted by their seconds."""
    weight = math.fsum(share.seconds for share in shares)
    if weight == 0:
        return 0.0
    return min(1.0, math.fsum(share.coverage_ratio * share.seconds for share in shares) / weight)


def _share(data: Any, where: str) -> Share:
    optional = {f.name for f in fields(Share) if f.default is not MISSING}
    table = checked_table(data, where, required={f.name for f in fields(Share)} - optional, optional=optional)
    for name in ("device_uuid", "domain", "method", "attribution"):
        if not isinstance(table.get(name, ""), str):
            raise ValueError(f"{where}: {name} must be a string, not {table[name]!r}")
    may_be_none = ("joules", "joules_low", "joules_high")
    numbers = {
        name: checked_number(table, name, where)
        for name in _SHARE_NUMBERS
        if name in table and not (name in may_be_none and table[name] is None)
    }
    throttled = table.get("throttled_seconds")
    if throttled is not None:
        checked_table(throttled, f"{where}: throttled_seconds", required=set(), optional=throttled)
        throttled = {reason: checked_number(throttled, reason, f"{where}: throttled_seconds") for reason in throttled}
    return Share(**{**table, **numbers, "throttled_seconds": throttled})
