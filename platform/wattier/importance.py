"""Which hyper-parameters matter to the loss and to the joules, as far as the trials of one stage can say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from wattier.records import TrialResult
from wattier.views_search import LOG_SPREAD, is_number, varied_parameters

LEAST_TRIALS, LEAST_TRIALS_A_PARAMETER = 12, 4
MOST_TRIALS = 250  # more make the forests slow and the answer no better
TREES, SEED = 32, 0
LEAST_EXPLAINED = 0.2  # of the variance of trials that a forest has not seen


class Importance(NamedTuple):
    """Shares of the variance of one objective that its hyper-parameters explain alone or together, adding up to 1.

    explained_ratio: of the variance of trials left out in turn, what a forest foretells (R²); at 0 it knows nothing.
    shares: by parameter, the largest first; empty where that would mean nothing, and `why_not` says why.
    """

    objective: str
    shares: dict[str, float]
    explained_ratio: float | None
    why_not: str


class ImportanceInfo(NamedTuple):
    """Importance for each objective, from the complete trials of one stage."""

    stage: str
    trials: int
    objectives: tuple[Importance, ...]


def importance_info(candidates: Sequence[TrialResult], stage: str) -> ImportanceInfo | None:
    """fANOVA (Hutter et al. 2014, https://proceedings.mlr.press/v32/hutter14.html) of log loss and log joules.

    Args:
        candidates: trials that finished the stage, with a loss and joules.
        stage: their stage.

    Returns:
        None where no parameter differs between them.
    """
    names = varied_parameters(candidates)
    if not names:
        return None
    step = -(-len(candidates) // MOST_TRIALS)
    chosen = list(candidates)[::step]
    columns = {name: [trial.params.get(name) for trial in chosen] for name in names}
    targets = {
        "validation loss": np.array([trial.val_loss for trial in chosen], dtype=np.float64),
        "energy": np.array([trial.energy_joules for trial in chosen], dtype=np.float64),
    }
    found = tuple(_importance(objective, columns, target) for objective, target in targets.items())
    return ImportanceInfo(stage, len(chosen), found)


def _importance(objective: str, columns: dict[str, list[Any]], target: NDArray[np.float64]) -> Importance:
    wanted = max(LEAST_TRIALS, LEAST_TRIALS_A_PARAMETER * len(columns))
    if len(target) < wanted:
        why = f"{len(target)} trials are too few to say for {len(columns)} hyper-parameters; {wanted} would do"
        return Importance(objective, {}, None, why)
    values = np.log(target) if (target > 0).all() else target
    if np.ptp(values) == 0:
        return Importance(objective, {}, None, "it is the same for all trials")
    explained = _explained_ratio(columns, values)
    if explained < LEAST_EXPLAINED:
        why = "the hyper-parameters do not foretell it: noise, or more trials are needed"
        return Importance(objective, {}, explained, why)
    shares = _fanova(columns, values)
    return Importance(objective, dict(sorted(shares.items(), key=lambda item: -item[1])), explained, "")


def _explained_ratio(columns: dict[str, list[Any]], values: NDArray[np.float64]) -> float:
    """R² of a forest on trials it has not seen; never below 0."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold, cross_val_predict

    features = np.column_stack([column for name in columns for column in _features(columns[name])])
    forest = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=SEED)
    folds = KFold(5, shuffle=True, random_state=SEED)
    foretold = cross_val_predict(forest, features, values, cv=folds)
    return max(0.0, 1 - float(np.mean((values - foretold) ** 2) / np.var(values)))


def _features(column: list[Any]) -> list[NDArray[np.float64]]:
    if all(is_number(value) for value in column):
        return [np.array(column, dtype=np.float64)]
    texts = [str(value) for value in column]
    return [np.array([text == choice for text in texts], dtype=np.float64) for choice in sorted(set(texts))]


def _fanova(columns: dict[str, list[Any]], values: NDArray[np.float64]) -> dict[str, float]:
    space = {name: _distribution(column) for name, column in columns.items()}
    rows = [
        {
            name: _fit(space[name], columns[name][index]) for name in columns
        }  # a value that was missing is its own choice
        for index in range(len(values))
    ]
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study()
            for row, value in zip(rows, values, strict=True):
                study.add_trial(create_trial(params=row, distributions=space, value=float(value)))
            evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=SEED)
            return dict(get_param_importances(study, evaluator=evaluator))
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(column: list[Any]) -> BaseDistribution:
    if all(is_number(value) for value in column):
        low, high = float(min(column)), float(max(column))
        return FloatDistribution(low, high, log=low > 0 and high / low > LOG_SPREAD)
    return CategoricalDistribution(sorted({str(value) for value in column}))


def _fit(distribution: BaseDistribution, value: Any) -> Any:
    return float(value) if isinstance(distribution, FloatDistribution) else str(value)
