"""One typed YAML a run. Everything is checked here, before anything starts."""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from wattier.errors import UserError, did_you_mean

Positive = Annotated[int, Field(gt=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
SourceName = Literal["ani1x", "qm7x", "oc20", "oc22", "mptrj", "extxyz"]
MAX_CONFIG_BYTES = 1_000_000


class Section(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SplitSection(Section):
    """Shares of the structures of each source; whole groups fall on one side."""

    train: PositiveFloat = 0.8
    val: PositiveFloat = 0.1
    test: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        if not math.isclose(self.train + self.val + self.test, 1.0, abs_tol=1e-6):
            raise ValueError(f"shares sum to {self.train + self.val + self.test:g}, but must sum to 1")
        return self


class DataSection(Section):
    """What to read and how to clean it. A source is a path, or `sample` for the corpus that ships with Wattier."""

    sources: dict[SourceName, PathText] = Field(min_length=1)
    cutoff_angstrom: PositiveFloat = 5.0
    max_force_ev_per_angstrom: PositiveFloat = 100.0
    on_bad: Literal["refuse", "skip"] = "refuse"
    split: SplitSection = SplitSection()


class ModelSection(Section):
    """The network; a key that is also in `search.space` takes its value from the trial."""

    hidden_dim: Positive = 64
    n_layers: Positive = 3
    n_radial: Positive = 16
    head_dim: Positive = 64
    n_head_layers: Positive = 2
    forces: Literal["conservative", "vector"] = "conservative"


class TrainingSection(Section):
    """How to train; a key that is also in `search.space` takes its value from the trial."""

    batch_structures: Positive = 32
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    energy_weight: NonNegativeFloat = 1.0
    force_weight: NonNegativeFloat = 1.0
    gradient_clip_norm: PositiveFloat = 10.0
    min_improvement_ratio: NonNegativeFloat = 1e-3
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Positive = 5
    min_learning_rate: NonNegativeFloat = 1e-5
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99


class RangeParameter(Section):
    """Numbers from low to high, both included; integers if low and high are."""

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, but low must be at most high, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, but must be above 0 on a log scale")
        if self.log and self.step is not None:
            raise ValueError("log and step are both given, but only one can be used. Remove one of them")
        if self.step is not None:
            _refuse_uneven_step(self.low, self.high, self.step)
        return self


def _refuse_uneven_step(low: float, high: float, step: float) -> None:
    if all(isinstance(bound, int) for bound in (low, high)) and not float(step).is_integer():
        raise ValueError(f"step is {step}, but must be a whole number, as low and high are")
    steps = (high - low) / step
    if steps < 0.5 or not math.isclose(steps, round(steps), rel_tol=1e-9):
        raise ValueError(f"step is {step}, but must lead from low, {low}, to high, {high}, in whole steps")


class ChoiceParameter(Section):
    """One of some values."""

    choices: list[str | int | float | bool] = Field(min_length=1)


def _parameter_kind(value: Any) -> str:
    chosen = "choices" in value if isinstance(value, dict) else isinstance(value, ChoiceParameter)
    return "ChoiceParameter" if chosen else "RangeParameter"


Parameter = Annotated[
    Annotated[RangeParameter, Tag("RangeParameter")] | Annotated[ChoiceParameter, Tag("ChoiceParameter")],
    Discriminator(_parameter_kind),
]
PARAMETER_KINDS = ("RangeParameter", "ChoiceParameter")


class StageSection(Section):
    """One rung of the funnel. structures: null = all training structures. promote: trials of the stage before that run
    again at this fidelity; `trials` counts them too. reduction_factor: null = no early stopping inside the stage."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
    trials: Annotated[int, Field(gt=0, le=100_000)]
    structures: Positive | None = None
    epochs: Positive = 1
    ranks: Positive = 1
    promote: Annotated[int, Field(ge=0)] = 0
    reduction_factor: Annotated[int, Field(ge=2)] | None = 3

    @model_validator(mode="after")
    def _promote_at_most_trials(self) -> Self:
        if self.promote > self.trials:
            raise ValueError(f"promote is {self.promote}, but must be at most trials, {self.trials}")
        return self


class SearchSection(Section):
    """The funnel of stages. Objectives are always validation loss and joules, both minimised, within one stage."""

    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    max_concurrent: Positive | None = None
    space: dict[str, Parameter]
    stages: list[StageSection] = Field(min_length=1)

    @field_validator("space")
    @classmethod
    def _known_parameters(cls, space: dict[str, Any]) -> dict[str, Any]:
        known = {**ModelSection.model_fields, **TrainingSection.model_fields}
        for name, parameter in space.items():
            if name not in known:
                hint = did_you_mean(name, known) or f" Known are {', '.join(sorted(known))}"
                raise ValueError(f"unknown parameter {name!r}.{hint}")
            _refuse_forbidden_values(name, parameter)
        return space

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or {"full"} & set(names):
            raise ValueError(f"stage names are {names}, but must all differ, and none may be 'full'")
        return self

    @model_validator(mode="after")
    def _promoted_exist(self) -> Self:
        trials = 0
        for stage in self.stages:
            if stage.promote > trials:
                raise ValueError(
                    f"stage {stage.name!r} promotes {stage.promote} trials of the stage before, but that has {trials}"
                )
            trials = stage.trials
        return self


def _refuse_forbidden_values(name: str, parameter: RangeParameter | ChoiceParameter) -> None:
    """What a trial could not be built from is refused before any trial starts."""
    values = parameter.choices if isinstance(parameter, ChoiceParameter) else [parameter.low, parameter.high]
    section = ModelSection if name in ModelSection.model_fields else TrainingSection
    for value in values:
        try:
            section.model_validate({name: value})
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
            raise ValueError(f"{name} reaches {value!r}, but {reason}") from error


class SelectSection(Section):
    """Sizes of the tiers: accurate = lowest loss, balanced = best trade-off between loss and joules."""

    accurate: Annotated[int, Field(ge=0)] = 1
    balanced: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.accurate + self.balanced < 1:
            raise ValueError("both tiers are empty, but at least one trial must be picked")
        return self


class FullTrainingSection(Section):
    """Training of the picked trials to convergence on all training structures.

    warm_start: begin from the weights that the trial had at the end of its last stage, whose joules are already paid.
    """

    epochs: Positive = 1000
    early_stop_patience: Positive = 10
    ranks: Positive = 1
    warm_start: bool = False


class ResourcesSection(Section):
    """What one rank of a trial gets. gpus_per_rank: at most 1; null = one GPU where there is one, else none.
    address: of a running Ray cluster, or null for a private one on this machine."""

    cpus_per_rank: Positive = 1
    gpus_per_rank: Annotated[float, Field(ge=0, le=1)] | None = None
    address: str | None = None
    retries: Annotated[int, Field(ge=0)] = 1


class TelemetrySection(Section):
    """Where joules come from: auto, nvml, amd, rapl, estimated, or replay:FILE."""

    source: PathText = "auto"
    rated_watts_per_core: PositiveFloat | None = None
    interval_seconds: PositiveFloat = 0.1


class RunConfig(Section):
    """A whole run, from data to release."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    run_dir: PathText
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    launcher: Literal["ray", "inline"] = "ray"
    data: DataSection
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    search: SearchSection
    select: SelectSection = SelectSection()
    full_training: FullTrainingSection = FullTrainingSection()
    resources: ResourcesSection = ResourcesSection()
    telemetry: TelemetrySection = TelemetrySection()

    @field_validator("run_dir")
    @classmethod
    def _on_this_machine(cls, run_dir: str) -> str:
        if "://" in run_dir:
            raise ValueError(f"is {run_dir!r}, but must be a path on a file system. Mount the storage on every node")
        return run_dir

    def to_yaml(self) -> str:
        """The whole config, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class ReferenceSize(Section):
    """Sizes of one model in the published layer algebra, see `wattier_gnn.published`."""

    architecture: Literal["reference"]
    hidden_dim: Positive
    n_layers: Annotated[int, Field(ge=2)]
    shared: list[Positive] = Field(min_length=1)
    energy_head: list[Positive] = Field(min_length=1)
    force_head: list[Positive] = Field(min_length=1)


class SizesConfig(Section):
    """Named model sizes, as in ``configs/talk_sizes.yaml``."""

    sizes: dict[str, ReferenceSize] = Field(min_length=1)


SectionT = TypeVar("SectionT", bound=Section)


def load_config(path: Path) -> RunConfig:
    """Read and check a run's YAML.

    Raises:
        UserError: no such file, no YAML, an unknown key, a wrong type or value; the first problem, in one line.
    """
    return _load(path, RunConfig)


def load_sizes(path: Path) -> SizesConfig:
    """Read and check a file of model sizes; errors as in `load_config`."""
    return _load(path, SizesConfig)


def _load(path: Path, kind: type[SectionT]) -> SectionT:
    data = _read_yaml(path)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(path, kind, error)) from error


def _read_yaml(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{path}: is a folder, but must be a YAML file. Give the path of the config.")
        if size > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: is {size} bytes, but a config must be under {MAX_CONFIG_BYTES}. Is it a config?")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML config.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text. Give the path of a YAML config.") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # PyYAML raises YAMLError, RecursionError, ValueError, KeyError ... by content
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: is not valid YAML ({reason}). Mend that line.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {_kind(data)}, but must be a mapping with keys such as name, data, search.")
    return data


class _StrictLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and everybody expects; refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _explain(path: Path, kind: type[Section], error: ValidationError) -> str:
    """The first problem, as ``file: search.stages[0]: unknown key 'epoch'. Did you mean 'epochs'?``."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] in ("extra_forbidden", "invalid_key")), problems[0])
    location = [part for part in problem["loc"] if part not in (*PARAMETER_KINDS, "[key]")]
    more = f" ({len(problems) - 1} more problems follow.)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        *parents, key = location
        known = _known_keys(kind, list(problem["loc"][:-1]))
        return f"{path.name}: {_dotted(parents)}unknown key {key!r}.{did_you_mean(str(key), known)}" + (
            "" if did_you_mean(str(key), known) else f" Known are {', '.join(known)}." if known else ""
        )
    where = _dotted(location)
    if problem["type"] == "invalid_key":
        return f"{path.name}: {_dotted(location[:-1])}key {_kind(problem['input'])} is no text. Quote it, or remove it."
    if problem["type"] == "missing":
        return f"{path.name}: {where}is missing, but must be given. Add it."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    message = re.sub(r"a valid dictionary or instance of \w+", "a mapping", message)
    given = "" if problem["type"] == "value_error" else f"is {_kind(problem['input'])}, but "
    return f"{path.name}: {where}{given}{message}{'' if message.endswith('?') else '.'}{more}"


def _known_keys(kind: type[BaseModel], location: list[Any]) -> list[str]:
    """Field names of the section at a location."""
    schema = kind.model_json_schema()
    node: Any = schema
    for part in location:
        node = _resolve(schema, node)
        if part in PARAMETER_KINDS:
            node = schema["$defs"][part]
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        if not isinstance(node, dict):
            return []
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    resolved: dict[str, Any] = schema["$defs"][reference.rsplit("/", 1)[1]] if reference else node
    return resolved


def _dotted(location: list[Any]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return f"{text}: " if text else ""


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    text = _shortly.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_shortly = reprlib.Repr()  # nested aliases can make a small file's repr fill the memory
_shortly.maxlevel, _shortly.maxstring, _shortly.maxother = 2, 60, 60
