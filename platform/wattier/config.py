"""One typed YAML a run. Everything is checked here, before anything starts."""

from __future__ import annotations

import ipaddress
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from wattier.config_combinations import refuse_wrong_combinations
from wattier.config_ensemble import EnsembleSection, FullTrainingSection, SelectSection
from wattier.config_errors import explain
from wattier.config_search import SearchSection
from wattier.config_space import (
    ChoiceParameter,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    RangeParameter,
    Section,
)
from wattier.errors import UserError, did_you_mean
from wattier.strict_yaml import read_yaml

SourceName = Literal["ani1x", "qm7x", "oc20", "oc22", "mptrj", "extxyz", "ase_db"]


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
    """What to read and how to clean it. A source is a path, or `sample` for the corpus that ships with Wattier.

    store: a folder that `wattier data ingest` made, shared by several runs; null = the run makes its own, from sources.
    force_norm: per_atom compares the largest force on an atom with the threshold, frobenius the norm over all atoms.
    neighbors: precomputed takes room on the disk (14 bytes an edge), on_the_fly takes time in each batch.
    placement: mapped reads the store as it lies; spread loads it once, a share into the memory of each rank.
    """

    sources: dict[SourceName, PathText] = Field(default_factory=dict)
    store: PathText | None = None
    cutoff_angstrom: PositiveFloat = 5.0
    max_force_ev_per_angstrom: PositiveFloat = 100.0
    force_norm: Literal["per_atom", "frobenius"] = "per_atom"
    on_bad: Literal["refuse", "skip"] = "refuse"
    split: SplitSection = SplitSection()
    neighbors: Literal["precomputed", "on_the_fly"] = "precomputed"
    placement: Literal["mapped", "spread"] = "mapped"


class ModelSection(Section):
    """The network; a key that is also in `search.space` takes its value from the trial.

    energy_heads: a network a source, one for all, or the sum of the two. forces: minus the gradient of the energy, an
    equivariant vector head, or a head that is neither (the published kind). precision: of the encoder's linear layers.
    activation_checkpointing, edge_chunk: less memory for more work; edge_chunk counts edges and is for egnn alone.
    energy_variance: a head that says by how much the energy will err; it changes neither energies nor forces.
    cutoff_angstrom: of the neighbours it sees, at most data.cutoff_angstrom; null = that.
    """

    family: Literal["egnn", "schnet", "pna"] = "egnn"
    cutoff_angstrom: PositiveFloat | None = None
    hidden_dim: Positive = 64
    n_layers: Positive = 3
    n_radial: Positive = 16
    head_dim: Positive = 64
    n_head_layers: Positive = 2
    energy_heads: Literal["per_source", "shared", "both"] = "per_source"
    forces: Literal["conservative", "vector", "direct"] = "conservative"
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    edge_chunk: Positive | None = None
    energy_variance: bool = False


class TrainingSection(Section):
    """How to train; a key that is also in `search.space` takes its value from the trial.

    batch_structures, batch_atoms, batch_edges: the most that one step over all ranks may hold; null = unbounded.
    mixture: shares of the sources in an epoch: natural, uniform (alike), temperature (n^(1/T)) or weights (those of
    source_weights). epoch_structures: draws an epoch, null = as many as there are training structures.
    loss: of scaled errors, huber straight above huber_delta; the validation loss is always of absolute errors.
    warmup_steps, warmup_epochs: the learning rate rises from 0 for so long. schedule: plateau, or a cosine to the end.
    sharding: none = a copy of the model a rank (DDP), fsdp = a part of it a rank.
    checkpoint_seconds: time between two checkpoints within an epoch. prefetch_batches: read ahead in the background.
    power_cap_ratio: the power limit of each GPU while it trains, as a part of its default limit; null = as it is.
    """

    batch_structures: Positive = 32
    batch_atoms: Positive | None = None
    batch_edges: Positive | None = None
    mixture: Literal["natural", "uniform", "temperature", "weights"] = "natural"
    mixture_temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    source_weights: dict[SourceName, PositiveFloat] | None = None
    epoch_structures: Positive | None = None
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    loss: Literal["mae", "mse", "huber"] = "mae"
    huber_delta: PositiveFloat = 0.1
    energy_weight: NonNegativeFloat = 1.0
    force_weight: NonNegativeFloat = 1.0
    gradient_clip_norm: PositiveFloat = 10.0
    min_improvement_ratio: NonNegativeFloat = 1e-3
    schedule: Literal["plateau", "cosine"] = "plateau"
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    warmup_epochs: NonNegativeFloat = 0.0
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Positive = 5
    min_learning_rate: NonNegativeFloat = 1e-5
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    sharding: Literal["none", "fsdp"] = "none"
    checkpoint_seconds: PositiveFloat = 300.0
    prefetch_batches: Annotated[int, Field(ge=0, le=64)] = 2
    power_cap_ratio: Annotated[float, Field(gt=0, le=1)] | None = None

    def for_trainer(self) -> dict[str, Any]:
        """The settings that the trainer itself is given."""
        return self.model_dump(exclude={"power_cap_ratio"})


def field_type(name: str) -> Any:
    """The type of a parameter that can be searched: int, float or a literal; None, as a default, aside."""
    annotation: Any = {**ModelSection.model_fields, **TrainingSection.model_fields}[name].annotation
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def check_space(space: dict[str, RangeParameter | ChoiceParameter]) -> None:
    """Refuse what is no setting of a model or its training, or reaches a value that it cannot have.

    Raises:
        ValueError: the first problem, with its place.
    """
    known = {**ModelSection.model_fields, **TrainingSection.model_fields}
    for name, parameter in space.items():
        if name not in known:
            hint = did_you_mean(name, known) or f" Known are {', '.join(sorted(known))}"
            raise ValueError(f"search.space: unknown parameter {name!r}.{hint}")
        _refuse_forbidden_values(name, parameter)


def _refuse_forbidden_values(name: str, parameter: RangeParameter | ChoiceParameter) -> None:
    """What a trial could not be built from is refused before any trial starts."""
    values = parameter.choices if isinstance(parameter, ChoiceParameter) else [parameter.low, parameter.high]
    step = parameter.step if isinstance(parameter, RangeParameter) else None
    if field_type(name) is int and not float(step or 1).is_integer():
        raise ValueError(f"search.space: step of {name} is {step}, but must be a whole number, as {name} is")
    section = ModelSection if name in ModelSection.model_fields else TrainingSection
    for value in values:
        try:
            section.model_validate({name: value})
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
            raise ValueError(f"search.space: {name} reaches {value!r}, but {reason}") from error


class ResourcesSection(Section):
    """What one rank of a trial gets. gpus_per_rank: at most 1; null = one GPU, or equal parts where there are fewer.
    address: of a running Ray cluster, or null for a private one on this machine. retries: of a trial whose process
    fails, hangs or is lost with its node. stall_seconds: how long a trial may go without reporting an epoch or saving a
    checkpoint before its processes are killed, and how long one may wait for nodes that could hold it; null = for ever.
    walltime_seconds: how long one command may last before its trials save and it leaves, to be run again; null = as
    long as the batch job that it runs in.
    allow_power_cap: whether trials may set power limits of GPUs, which are put back afterwards.
    """

    cpus_per_rank: Positive = 1
    gpus_per_rank: Annotated[float, Field(ge=0, le=1)] | None = None
    address: str | None = None
    retries: Annotated[int, Field(ge=0)] = 1
    stall_seconds: PositiveFloat | None = 1800.0
    walltime_seconds: PositiveFloat | None = None
    allow_power_cap: bool = False


class TelemetrySection(Section):
    """Where joules come from: auto, nvml, amd, rapl, cray, estimated, or replay:FILE; stated = your own trial says.

    journal_seconds: between two writes of a rank's energy journal, null = at every reading; with thousands of ranks on
    one shared file system some seconds. A killed rank is billed up to so many seconds too much (docs/scale.md).
    throttled_share: a trial whose devices were throttled for a larger share of its time is flagged in its record,
    since its joules and seconds are not comparable. exporter: serve Prometheus metrics on every node that runs trials,
    for as long as the command lasts. exporter_port: 0 = any free one. exporter_address: 0.0.0.0 = all networks of a
    node. exporter_allow: networks (CIDR) that may ask; a node always answers itself.
    """

    source: PathText = "auto"
    rated_watts_per_core: PositiveFloat | None = None
    interval_seconds: PositiveFloat = 0.05
    journal_seconds: PositiveFloat | None = None
    throttled_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    exporter: bool = False
    exporter_address: str = "127.0.0.1"
    exporter_port: Annotated[int, Field(ge=0, le=65535)] = 9500
    exporter_allow: list[str] = Field(default=[])

    @field_validator("exporter_address")
    @classmethod
    def _an_address(cls, address: str) -> str:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ValueError(f"is {address!r}, but must be an IP address, such as 127.0.0.1 or 0.0.0.0") from None
        return address

    @field_validator("exporter_allow")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"{network!r} is no network ({error}). Give one such as 10.1.0.0/16") from None
        return networks

    @model_validator(mode="after")
    def _somebody_may_ask(self) -> Self:
        if self.exporter and not self.exporter_allow and not ipaddress.ip_address(self.exporter_address).is_loopback:
            raise ValueError(
                f"exporter_address is {self.exporter_address}, for other machines, but exporter_allow is empty, so "
                "that none of them may ask. Name the network of your Prometheus, such as 10.1.0.0/16"
            )
        return self


class RunConfig(Section):
    """A whole run, from data to release.

    trial: the training function of a model of your own, as module:function; null = Wattier's models, which need `data`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    run_dir: PathText
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    launcher: Literal["ray", "inline"] = "ray"
    trial: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*$")] | None = None
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    search: SearchSection
    select: SelectSection = SelectSection()
    full_training: FullTrainingSection = FullTrainingSection()
    ensemble: EnsembleSection = EnsembleSection()
    resources: ResourcesSection = ResourcesSection()
    telemetry: TelemetrySection = TelemetrySection()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.trial is None:
            check_space(self.search.space)
        refuse_wrong_combinations(self)
        return self

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


SizeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]  # a folder's, too


class SizesConfig(Section):
    """Named model sizes, as in ``configs/talk_sizes.yaml``; `models` are sizes of Wattier's own network."""

    sizes: dict[SizeName, ReferenceSize] = Field(default={})
    models: dict[SizeName, ModelSection] = Field(default={})

    @model_validator(mode="after")
    def _some_and_told_apart(self) -> Self:
        if not self.sizes and not self.models:
            raise ValueError("names no size, but must name one. Add it below sizes or models")
        if both := sorted(set(self.sizes) & set(self.models)):
            raise ValueError(f"{both[0]} is in sizes and in models, but a name must be one size. Rename one")
        return self

    def all_by_name(self) -> dict[str, ReferenceSize | ModelSection]:
        """All sizes, those of the published network first."""
        return {**self.sizes, **self.models}


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
    return checked(kind, read_yaml(path), path)


def checked(kind: type[SectionT], values: Any, where: Path) -> SectionT:
    """A section of some values; errors as in `load_config`, which name `where` they are from."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(where, kind, error)) from error
