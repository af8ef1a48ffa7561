"""The machines: power, memory, and what goes wrong. What is of all GPUs reads recording rules."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as grafana

from boards.layout import TO_HOST, dashboard, variables
from boards.panels import (
    BYTES,
    CELSIUS,
    COUNT,
    HERTZ,
    RATIO,
    WATTS,
    AnyPanel,
    Link,
    Query,
    bars,
    curves,
    figure,
    heat_map,
    linked,
    rows,
    time_line,
)

HOST = '{instance=~"$host"}'
DEVICE = "{{instance}} {{device}} {{uuid}}"
GPU, JOB, REASON = 'domain="gpu"', 'job="wattier"', 'reason!="none"'
SHOWN = 32  # series in a panel of devices, the largest in the time range

PACKAGES = (  # watts of each package: a card is one, and so are the two dies of an MI250X
    'sum by (instance, package) (wattier_power_watts{instance=~"$host", domain="gpu"} '
    "* on (instance, uuid) group_left (package) ("
    'wattier_device_info{instance=~"$host", package!=""} '
    'or label_replace(wattier_device_info{instance=~"$host", package=""}, "package", "$1", "uuid", "(.*)")))'
)


def device(metric: str, *conditions: str) -> str:
    """A device's own series, on the chosen hosts."""
    return metric + "{" + ", ".join(['instance=~"$host"', *conditions]) + "}"


def largest(series: str, over: str = "max_over_time") -> str:
    """The series that are largest in the time range, the same at every moment of it."""
    return f"{series} and topk({SHOWN}, {over}({series}[$__range] @ end()))"


def _now() -> list[AnyPanel]:
    up = device("up", JOB)
    lost = f"wattier:devices:count{HOST} - wattier:devices_up:count{HOST}"
    errors = device("wattier_read_errors_total")
    return [
        figure("Power", "All devices of the chosen hosts.", WATTS, Query(f"sum(wattier:power_watts:sum{HOST})")),
        figure("GPUs", "That answer.", COUNT, Query(f"sum(wattier:devices_up:count{HOST})")),
        figure("GPUs lost", "That their exporter cannot read any more.", COUNT, Query(f"sum({lost})"), bad=1.0),
        figure("Exporters down", "Hosts whose exporter does not answer.", COUNT, Query(f"sum(1 - {up})"), bad=1.0),
        figure(
            "Idle watts wasted now",
            "Power of GPUs that belong to a trial and do nothing.",
            WATTS,
            Query(f"sum(wattier:idle_allocated_watts:sum{HOST})"),
        ),
        figure("Failed readings", "Since the exporters started.", COUNT, Query(f"sum({errors})"), bad=1.0),
    ]


def _fleet() -> list[AnyPanel]:
    return [
        heat_map(
            "Power of all GPUs",
            "How many GPUs draw how much, in steps of 50 W; all hosts. A die of an MI250X counts with its part of the "
            "package's power.",
            WATTS,
            Query("sum by (watts) (wattier:fleet_power_watts:bucket)", "{{watts}}"),
            axis="power of a GPU",
        ),
        curves(
            "Power of all hosts",
            "Sums over devices, by kind.",
            WATTS,
            Query("wattier:fleet_power_watts:sum", "{{domain}}"),
            axis="power",
            stacked=True,
        ),
        curves(
            "Largest device memory (HBM) over all GPUs",
            "The most that any GPU uses: near its total, the next larger batch fails.",
            BYTES,
            Query("wattier:fleet_memory_used_bytes:max", "largest"),
            axis="memory",
        ),
        curves(
            "Temperature of all GPUs",
            "Hottest core sensors: the median GPU, the 95th percentile, the hottest.",
            CELSIUS,
            Query("wattier:fleet_temperature_celsius:quantile", "quantile {{quantile}}"),
            axis="temperature",
        ),
        curves(
            "Compute clock of all GPUs",
            "The median GPU, the 5th percentile, the slowest. Idle GPUs are slow.",
            HERTZ,
            Query("wattier:fleet_clock_hertz:quantile", "quantile {{quantile}}"),
            axis="clock",
        ),
    ]


def _throttling() -> list[AnyPanel]:
    throttled, counted = device("wattier_throttled", REASON), device("wattier_throttled_seconds_total")
    gpus = f"sum(wattier:devices:count{HOST})"
    return [
        curves(
            "Throttled GPUs by reason",
            "How many a reason holds down. A power cap under full load is how a GPU is meant to work.",
            COUNT,
            Query(f"sum(wattier:throttled:any{HOST})", "any reason"),
            Query(f"sum by (reason) (wattier:throttled:count{HOST})", "{{reason}}"),
            axis="GPUs",
        ),
        bars(  # one answer for the whole range: as a curve it would read the range anew for each of its points
            "Time throttled",
            "Share of all GPUs' time in the time range, by reason, as the devices count it. Empty where none counts.",
            RATIO,
            Query(
                f"sum by (reason) (max_over_time({counted}[$__range]) - min_over_time({counted}[$__range])) "
                f"/ ($__range_s * scalar({gpus}))",
                "{{reason}}",
            ),
        ),
        linked(
            time_line(
                "Throttling by GPU and reason",
                f"The {SHOWN} GPUs that were held down most. Empty while none is.",
                Query(
                    f"{throttled} and topk({SHOWN}, avg_over_time({throttled}[$__range] @ end()) > 0)",
                    "{{reason}} {{instance}} {{uuid}}",
                ),
            ),
            TO_HOST,
        ),
    ]


def _trouble() -> list[AnyPanel]:
    lost, up = device("wattier_device_up", GPU), device("up", JOB)
    lagging = f"wattier:trial_clock_ratio{HOST} < 0.9"
    dies = device("wattier_ecc_uncorrected_total")
    held = f"max by (instance, uuid, reason) ({device('wattier_throttled', REASON)}) > 0"
    return [
        curves(
            "Idle watts wasted",
            "Power of GPUs that belong to a trial and are busy less than 5 % of the time, by host; the largest.",
            WATTS,
            Query(largest(f"wattier:idle_allocated_watts:sum{HOST}"), "{{instance}}"),
            axis="power",
            stacked=True,
        ),
        linked(
            curves(
                "Stragglers",
                "GPUs whose clock is under 0.9 of the median of their trial's: all other ranks wait for them.",
                COUNT,
                Query("wattier:fleet_stragglers:count", "GPUs"),
                axis="GPUs",
            ),
            TO_HOST,
        ),
        rows(
            "Stragglers by trial",
            "The slowest now. Empty while there are none.",
            {"clock over the median": (f"bottomk({SHOWN}, {lagging})", RATIO)},
            span=12,
        ),
        curves(
            "Memory errors",
            "ECC errors since the drivers loaded, all GPUs of the chosen hosts. Empty where no GPU counts them.",
            COUNT,
            Query(f"sum({device('wattier_ecc_corrected_total')})", "corrected"),
            Query(f"sum({dies})", "uncorrected"),
            axis="errors",
        ),
        rows(
            "Lost GPUs and silent exporters",
            "What does not answer now, 1 a line. Empty while all do.",
            {
                "lost": (f"max by (instance, uuid) ({lost} == bool 0) > 0", COUNT),
                "silent": (f"max by (instance) ({up} == bool 0) > 0", COUNT),
            },
            span=12,
        ),
        bars(
            "GPUs throttled now",
            "By reason and host. Empty while none is.",
            COUNT,
            Query(f"topk({SHOWN}, sum by (instance, reason) ({held}))", "{{instance}} {{reason}}"),
        ),
    ]


def _hosts() -> list[AnyPanel]:
    panels: list[AnyPanel] = [
        linked(
            curves(title, text, unit, Query(largest(series), legend), axis=axis),
            Link("This host alone", TO_HOST.url),
        )
        for title, text, unit, axis, series, legend in (
            (
                "Power by host",
                f"The {SHOWN} largest of the chosen hosts.",
                WATTS,
                "power",
                device("wattier:power_watts:sum", GPU),
                "{{instance}}",
            ),
            (
                "Power by GPU",
                f"The {SHOWN} largest. NVML's power is a 1 s mean; a die of an MI250X has its part of the package's.",
                WATTS,
                "power",
                device("wattier_power_watts", GPU),
                DEVICE,
            ),
            (
                "Device memory (HBM) by GPU",
                f"The {SHOWN} that use most.",
                BYTES,
                "memory",
                device("wattier_memory_used_bytes", GPU),
                DEVICE,
            ),
            (
                "Utilisation by GPU",
                f"The {SHOWN} busiest. Share of time with work; not how well.",
                RATIO,
                "busy",
                device("wattier_utilization_ratio"),
                DEVICE,
            ),
            (
                "Temperature by GPU",
                f"The {SHOWN} hottest.",
                CELSIUS,
                "temperature",
                device("wattier_temperature_celsius"),
                DEVICE,
            ),
        )
    ]
    return [
        panels[0],
        curves(
            "Power by package",
            f"The {SHOWN} largest now. A card is a package; so are the two dies of an MI250X: their sum.",
            WATTS,
            Query(f"topk({SHOWN}, {PACKAGES})", "{{instance}} {{package}}"),
            axis="power",
        ),
        *panels[1:],
    ]


def build() -> grafana.Dashboard:
    """The dashboard."""
    sections = {"Now": _now(), "All GPUs": _fleet(), "Trouble": [*_throttling(), *_trouble()], "Chosen hosts": _hosts()}
    return dashboard("fleet", "The GPUs of all hosts, and what goes wrong.", variables("host"), sections)
