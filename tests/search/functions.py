"""Problems with formulas: test functions with fidelity and an energy-like cost, learning curves, random functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from search.problems import FunctionProblem, KnownFront
from search.space import Array, Space

EPOCHS = (1, 3, 9, 27)
Columns = dict[str, Array]


def branin_currin() -> FunctionProblem:
    """Branin with fidelity (Wu et al. 2019, as BoTorch's AugmentedBranin) against a cost that Currin drives.

    Branin and Currin are the usual pair with two objectives: where one is low the other is high. Joules of an epoch
    are Currin's value times ten: from 12 to 138 J.
    """
    space: Space = {"x1": {"low": 0.0, "high": 1.0}, "x2": {"low": 0.0, "high": 1.0}}

    def curve(c: Columns, s: float) -> Array:
        a, b = 15.0 * c["x1"] - 5.0, 15.0 * c["x2"]
        bend = (b - (5.1 / (4 * math.pi**2) - 0.1 * (1 - s)) * a**2 + 5.0 / math.pi * a - 6.0) ** 2
        return bend + 10.0 * (1 - 1 / (8 * math.pi)) * np.cos(a) + 10.0 + 40.0 * (1 - s)

    return FunctionProblem("branin_currin", space, EPOCHS, curve, _currin_joules, 10.0, lambda s: 0.5 + 3.0 * (1 - s))


def _currin_joules(c: Columns) -> Array:
    x, y = c["x1"], np.maximum(c["x2"], 1e-9)
    top = 2300 * x**3 + 1900 * x**2 + 2092 * x + 60
    return 10.0 * (1 - np.exp(-1 / (2 * y))) * top / (100 * x**3 + 500 * x**2 + 4 * x + 20)


def zdt(number: int, dims: int) -> FunctionProblem:
    """ZDT1, 2 or 3 (Zitzler, Deb, Thiele 2000): joules are an affine function of f1, from 20 to 200 J an epoch.

    At low fidelity the other coordinates' optimum lies elsewhere, costly configurations look worse than they will be
    (their curves cross), and noise is larger.
    """
    space = _cube(dims)

    def curve(c: Columns, s: float) -> Array:
        x = np.column_stack(list(c.values()))
        g = 1 + 9 * np.abs(x[:, 1:] - 0.25 * (1 - s)).mean(axis=1)
        f1 = x[:, 0]
        ratio = f1 / g
        h = {1: 1 - np.sqrt(ratio), 2: 1 - ratio**2, 3: 1 - np.sqrt(ratio) - ratio * np.sin(10 * np.pi * f1)}[number]
        return g * h + 1.0 + (1 - s) * (1.0 + 0.8 * f1)

    def optimal() -> Array:
        return _line(dims, 0.0)

    noise = _noise(0.02, 0.1)
    name = f"zdt{number}"
    return KnownFront(name, space, EPOCHS, curve, lambda c: 20.0 + 180.0 * c["x1"], 60.0, noise, optimal)


def dtlz2(dims: int) -> FunctionProblem:
    """DTLZ2 with two objectives (Deb et al. 2002): one is the loss, the other drives joules; cost needs tuning too."""

    def g(c: Columns, shift: float) -> Array:
        rest = np.column_stack(list(c.values()))[:, 1:]
        return ((rest - 0.5 - shift) ** 2).sum(axis=1)

    def curve(c: Columns, s: float) -> Array:
        angle = c["x1"] * math.pi / 2
        return (1 + g(c, 0.2 * (1 - s))) * np.sin(angle) + 0.1 + (1 - s) * (0.7 + 0.4 * np.cos(angle))

    def joules(c: Columns) -> Array:
        return 15.0 + 120.0 * (1 + g(c, 0.0)) * np.cos(c["x1"] * math.pi / 2)

    return KnownFront("dtlz2", _cube(dims), EPOCHS, curve, joules, 40.0, _noise(0.01, 0.06), lambda: _line(dims, 0.5))


def dtlz7(dims: int) -> FunctionProblem:
    """DTLZ7 with two objectives: a front in pieces. Joules are an affine function of f1, 20 to 220 J an epoch."""

    def curve(c: Columns, s: float) -> Array:
        rest = np.column_stack(list(c.values()))[:, 1:]
        g = 1 + 9 * np.abs(rest - 0.2 * (1 - s)).mean(axis=1)
        f1 = c["x1"]
        h = 2 - f1 / (1 + g) * (1 + np.sin(3 * math.pi * f1))
        return (1 + g) * h + (1 - s) * (2.0 + 1.5 * f1)

    def optimal() -> Array:
        return _line(dims, 0.0)

    return KnownFront(
        "dtlz7", _cube(dims), EPOCHS, curve, lambda c: 20.0 + 200.0 * c["x1"], 60.0, _noise(0.03, 0.2), optimal
    )


def curves() -> FunctionProblem:
    """Learning curves of networks: power laws whose floor falls with size, and whose pace falls with it too.

    The floor follows a power law in parameters (Kaplan et al. 2020), the best learning rate falls with width and rises
    with the root of the batch, a larger batch takes fewer steps an epoch. Joules of an epoch are seconds (work over
    what a device does at this batch, and a latency each step) times watts, which rise with use.
    """
    space: Space = {
        "width": {"low": 32, "high": 256, "log": True},
        "depth": {"low": 2, "high": 6},
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "batch": {"low": 8, "high": 128, "log": True},
        "family": {"choices": ["egnn", "schnet", "pna"]},
    }

    def curve(c: Columns, s: float) -> Array:
        epoch = EPOCHS[-1] ** s
        size = _size(c)
        pace_factor, floor_factor = np.array([1.0, 1.5, 0.7]), np.array([1.0, 1.15, 1.05])
        family = c["family"].astype(int)
        best_rate = 3e-3 * (c["width"] / 128) ** -0.5 * (c["batch"] / 32) ** 0.5
        off = np.log10(c["learning_rate"] / best_rate)
        floor = floor_factor[family] * (0.08 * size**-0.25 + 0.006 * (c["depth"] - 4) ** 2 / (1 + c["depth"]))
        steps = epoch * 2000.0 / c["batch"]
        pace = pace_factor[family] * 10.0 ** (-np.maximum(-off, 0)) * size**-0.35
        falling = 0.9 * (1 + steps * pace / 60.0) ** -0.8
        return floor + falling + 0.15 * np.maximum(off, 0) ** 2 + 0.01 * (c["batch"] / 64)

    def joules(c: Columns) -> Array:
        use = c["batch"] / (c["batch"] + 24.0)
        seconds = 0.6 * _size(c) / use + 2000.0 / c["batch"] * 0.004
        return seconds * (90.0 + 210.0 * use)

    return FunctionProblem("curves", space, EPOCHS, curve, joules, 100.0, _noise(0.004, 0.02))


def _size(c: Columns) -> Array:
    """Work of a structure relative to width 128, depth 4; messages cost what the family makes of them."""
    work = np.array([1.0, 0.6, 1.6])[c["family"].astype(int)]
    return (c["width"] / 128) ** 1.5 * c["depth"] / 4 * work


def random_function(number: int) -> FunctionProblem:
    """A draw of Gaussian processes (random Fourier features, Rahimi and Recht 2007), none of it tuned by anybody.

    Dimensions (2 to 6), length scales, the loss's bias at low fidelity, how strongly joules lower it and noise follow
    from the number. Joules of an epoch span about an order of magnitude.
    """
    rng = np.random.default_rng([7, number])
    dims = 2 + number % 5
    loss, bias, cost = (_features(rng, dims, scale) for scale in (0.35, 0.5, 0.7))
    gain, pull, noise = rng.uniform(0.6, 1.4), rng.uniform(0.2, 0.9), rng.uniform(0.01, 0.05)

    def points(c: Columns) -> Array:
        return np.column_stack(list(c.values()))

    def epoch_joules(c: Columns) -> Array:
        return 60.0 * np.exp(0.7 * cost(points(c)))

    def curve(c: Columns, s: float) -> Array:
        x = points(c)
        size = cost(x)
        late = (1 - s) * (1.5 + 0.5 * pull * size + 0.6 * bias(x))
        return 4.0 + gain * loss(x) - pull * size + late

    return FunctionProblem(
        f"gp{number}", _cube(dims), EPOCHS, curve, epoch_joules, 60.0, lambda s: noise * (1 + 4 * (1 - s))
    )


def _features(rng: np.random.Generator, dims: int, scale: float, n: int = 96) -> Callable[[Array], Array]:
    """A random function of the unit cube, with mean 0 and standard deviation 1 over it."""
    scales = scale * math.sqrt(dims) * rng.uniform(0.7, 1.6, size=dims)
    frequencies, phases = rng.standard_normal((dims, n)) / scales[:, None], rng.uniform(0, 2 * np.pi, size=n)
    weights = rng.standard_normal(n) * math.sqrt(2 / n)
    waves = partial(_sum_of_waves, frequencies=frequencies, phases=phases)
    sample = waves(rng.random((4096, dims)), weights=weights)
    weights /= sample.std()
    return partial(waves, weights=weights, offset=-float(sample.mean() / sample.std()))


def _sum_of_waves(x: Array, *, frequencies: Array, phases: Array, weights: Array, offset: float = 0.0) -> Array:
    value: Array = np.cos(x @ frequencies + phases) @ weights + offset
    return value


def _cube(dims: int) -> Space:
    return {f"x{i + 1}": {"low": 0.0, "high": 1.0} for i in range(dims)}


def _line(dims: int, rest: float, n: int = 20_001) -> Array:
    points = np.full((n, dims), rest)
    points[:, 0] = np.linspace(0.0, 1.0, n)
    return points


def _noise(last: float, first: float) -> Callable[[float], float]:
    return lambda s: last + (first - last) * (1 - s)


BUILT_IN: dict[str, Callable[[], FunctionProblem]] = {
    "branin_currin": branin_currin,
    "zdt1": partial(zdt, 1, 5),
    "zdt2": partial(zdt, 2, 2),
    "zdt3": partial(zdt, 3, 3),
    "dtlz2": partial(dtlz2, 5),
    "dtlz7": partial(dtlz7, 3),
    "curves": curves,
    "gp0": partial(random_function, 0),
    "gp1": partial(random_function, 1),
    "gp2": partial(random_function, 2),
}
"""Random functions with other numbers (``gp3``, ``gp4`` ...) are there as well, for checks nobody has tuned to."""
