"""Reports add up like sets of shares, survive JSON, and refuse what would poison a sum."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wattier_telemetry import EnergyReport, Share

shares = st.builds(
    lambda uuid, start, length, fraction, joules, method, coverage, slack, attribution, throttled: Share(
        uuid,
        "gpu",
        start,
        start + length,
        fraction,
        joules,
        method,
        coverage,
        None if joules is None or slack is None else max(0.0, joules - slack),
        None if joules is None or slack is None else joules + slack,
        attribution,
        throttled,
    ),
    st.sampled_from(["a", "b"]),
    st.integers(0, 3).map(float),
    st.integers(0, 3).map(float),
    st.sampled_from([0.5, 1.0]),
    st.none() | st.floats(0, 1e6),
    st.sampled_from(["counter", "integrated", "estimated"]),
    st.floats(0, 1),
    st.none() | st.floats(0, 100),
    st.sampled_from(["whole", "utilization", "equal"]),
    st.none() | st.dictionaries(st.sampled_from(["power_cap", "heat"]), st.floats(0, 3)),
)
reports = st.builds(EnergyReport.of, st.lists(shares, max_size=5), st.lists(st.sampled_from("xyz"), max_size=3))


def figures(report):
    return report.shares, report.seconds, report.coverage_ratio, report.joules, report.method, set(report.warnings)


def share(uuid="a", start=0.0, end=10.0, joules=5.0, method="counter", **more):
    return Share(uuid, more.pop("domain", "gpu"), start, end, more.pop("fraction", 1.0), joules, method, **more)


@given(reports, reports)
def test_addition_commutes(a, b):
    assert figures(a + b) == figures(b + a)


@given(reports, reports, reports)
def test_addition_is_associative(a, b, c):
    assert figures((a + b) + c) == figures(a + (b + c))


@given(reports, reports)
def test_adding_what_is_there_changes_nothing(a, b):
    assert a + a == a
    assert figures((a + b) + a) == figures(a + b)
    assert a + EnergyReport.empty() == a


@given(reports)
def test_json_round_trip(report):
    assert EnergyReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_sums_by_domain_and_weakest_method():
    report = EnergyReport.of(
        [share(), share(end=20.0, joules=7.0, method="integrated"), share("c", domain="cpu", joules=2.0)]
    )
    assert report.joules_by_domain == {"gpu": 12.0, "cpu": 2.0}
    assert (report.joules, report.method) == (14.0, "integrated")


def test_nothing_measured_is_none_and_not_zero():
    report = EnergyReport.of([share(joules=None, coverage_ratio=0.0)])
    assert (report.joules, report.method, report.joules_by_domain) == (None, None, {})
    assert (report.seconds, report.coverage_ratio) == (10.0, 0.0)
    assert EnergyReport.empty().joules is None


def test_seconds_are_wall_time_and_coverage_is_weighted_by_time():
    attempt, parallel_rank = share(end=10.0), share("b", start=5.0, end=10.0, coverage_ratio=0.4)
    restart = share(start=100.0, end=105.0)
    report = EnergyReport.of([attempt]) + EnergyReport.of([parallel_rank]) + EnergyReport.of([restart])
    assert report.seconds == 15.0
    assert report.coverage_ratio == pytest.approx((10 + 0.4 * 5 + 5) / 20)


@pytest.mark.parametrize(
    "change",
    [
        {"shares": {}},
        {"seconds": "10"},
        {"seconds": True},
        {"seconds": float("nan")},
        {"coverage_ratio": None},
        {"warnings": "text"},
        {"warnings": [1]},
        {"surprise": 1},
        {"shares": [{}]},
        {"shares": [7]},
    ],
)
def test_bad_report_is_refused(change):
    with pytest.raises(ValueError, match=r"energy report|shares\[0\]"):
        EnergyReport.from_dict({**EnergyReport.of([share()]).to_dict(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"joules": float("nan")},
        {"joules": -1.0},
        {"joules": "5"},
        {"end_seconds": -1.0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"domain": "tpu"},
        {"method": "guessed"},
        {"coverage_ratio": 2.0},
        {"device_uuid": 5},
    ],
)
def test_bad_share_is_refused(change):
    data = EnergyReport.of([share()]).to_dict()
    data["shares"][0].update(change)
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        EnergyReport.from_dict(data)


def test_not_an_object():
    with pytest.raises(ValueError, match="must be a JSON object"):
        EnergyReport.from_dict([])


def test_bounds_add_up_and_a_share_without_one_counts_as_it_is():
    report = EnergyReport.of([share(joules_low=4.0, joules_high=7.0), share("b", joules=10.0), share("c", joules=None)])
    assert (report.joules_low, report.joules, report.joules_high) == (14.0, 15.0, 17.0)
    assert (EnergyReport.empty().joules_low, EnergyReport.empty().joules_high) == (None, None)


def test_bounds_are_told_unless_nobody_knows_them():
    stated = share(joules_low=4.0, joules_high=7.0)
    assert EnergyReport.of([stated, share("b", joules=10.0)]).stated_bounds_joules == (14.0, 17.0)
    assert EnergyReport.of([share()]).stated_bounds_joules == (None, None), "no share states any"
    guessed = share("b", method="estimated", joules_low=4.9, joules_high=5.1)
    assert EnergyReport.of([guessed]).stated_bounds_joules == (None, None)
    assert EnergyReport.of([stated, guessed]).stated_bounds_joules == (None, None), "a part is a guess"
    assert EnergyReport.empty().stated_bounds_joules == (None, None)


def test_throttling_is_a_part_of_the_time_of_the_devices_that_can_say():
    report = EnergyReport.of(
        [
            share("a", throttled_seconds={"power_cap": 3.0, "heat": 0.0}),
            share("b", throttled_seconds={"power_cap": 1.0, "heat": 2.0}),
            share("c"),
        ]
    )
    assert report.throttled_seconds == {"heat": 2.0, "power_cap": 4.0}
    assert report.throttled_ratio == 4.0 / 20.0
    assert EnergyReport.of([share()]).throttled_ratio is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"joules_low": -1.0},
        {"joules_low": 6.0, "joules_high": 5.5},
        {"joules_high": float("nan")},
        {"throttled_seconds": {"heat": -1.0}},
        {"throttled_seconds": {"heat": float("inf")}},
        {"attribution": "fair"},
    ],
)
def test_bounds_and_throttling_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        share(**wrong)
    data = EnergyReport.of([share()]).to_dict()
    data["shares"][0] |= wrong
    with pytest.raises(ValueError, match=r"shares\[0\]|share"):
        EnergyReport.from_dict(data)


def test_a_report_from_before_there_were_bounds_is_still_read():
    data = EnergyReport.of([share()]).to_dict()
    for name in ("joules_low", "joules_high", "attribution", "throttled_seconds"):
        del data["shares"][0][name]
    assert EnergyReport.from_dict(data) == EnergyReport.of([share()])
