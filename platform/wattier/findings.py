"""Everything a report tells, gathered once from the run directory; page, text, JSON and CSV are faces of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from wattier import views
from wattier.config import RunConfig
from wattier.importance import ImportanceInfo, importance_info
from wattier.records import TrialResult
from wattier.rundir import FULL_STAGE, RunDir, read_json
from wattier.select import split_candidates
from wattier.views_evaluation import CoverageRow, SourceErrors, coverage_rows, source_errors
from wattier.views_power import PowerInfo, power_info
from wattier.views_provenance import ProvenanceInfo, provenance_info
from wattier.views_search import (
    FunnelInfo,
    ParallelInfo,
    ProgressInfo,
    funnel_info,
    parallel_info,
    progress_info,
)
from wattier.views_selection import SelectionDetails, selection_details


class Findings(NamedTuple):
    """The views of one run; None = not that far yet."""

    config: RunConfig
    path: str
    config_text: str
    trials: views.TrialsInfo
    ledger: views.LedgerInfo
    projections: tuple[views.ProjectionInfo, ...]
    curves: tuple[views.Curve, ...]
    pareto: views.ParetoInfo | None
    selection: views.SelectionInfo | None
    details: SelectionDetails
    evaluation: views.EvaluationInfo | None
    errors: tuple[SourceErrors, ...]
    coverage: tuple[CoverageRow, ...]
    funnel: FunnelInfo
    progress: ProgressInfo | None
    parallel: ParallelInfo | None
    importance: ImportanceInfo | None
    power: PowerInfo
    provenance: ProvenanceInfo
    cleaning: dict[str, Any]

    @property
    def own(self) -> str | None:
        """The training function of a model of the user's own, which ends with the selection."""
        return self.config.trial


def gather(run: RunDir) -> Findings:
    """Read the run directory.

    Raises:
        UserError: a record of the run is damaged.
    """
    trials, pareto, selection = views.trials_info(run), views.pareto_info(run), views.selection_info(run)
    evaluation = views.evaluation_info(run)
    return Findings(
        config=run.config(),
        path=str(run.path),
        config_text=run.config_path.read_text(encoding="utf-8"),
        trials=trials,
        ledger=views.ledger_info(run),
        projections=views.projection_info(run),
        curves=views.learning_curves_info(run),
        pareto=pareto,
        selection=selection,
        details=selection_details(run),
        evaluation=evaluation,
        errors=source_errors(evaluation) if evaluation else (),
        coverage=coverage_rows(evaluation) if evaluation else (),
        funnel=funnel_info(run, trials, selection.selection if selection else None),
        progress=progress_info(run, pareto),
        parallel=parallel_info(trials, pareto),
        importance=_importance(run),
        power=power_info(run, trials.rows),
        provenance=provenance_info(run),
        cleaning=_cleaning(run),
    )


def _importance(run: RunDir) -> ImportanceInfo | None:
    """From the search stage that most trials have finished."""
    by_stage: dict[str, list[TrialResult]] = {}
    for stage in dict.fromkeys(trial.fidelity.stage for trial in run.trials()):
        if stage != FULL_STAGE:
            by_stage[stage] = split_candidates(run.trials(stage), stage=stage)[0]
    if not by_stage:
        return None
    stage = max(by_stage, key=lambda name: len(by_stage[name]))
    return importance_info(by_stage[stage], stage)


def _cleaning(run: RunDir) -> dict[str, Any]:
    path = run.store_manifest_path
    cleaning: dict[str, Any] = read_json(path).get("cleaning", {}) if path.exists() else {}
    return cleaning
