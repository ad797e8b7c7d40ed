# SPDX-License-Identifier: Apache-2.0
"""Settings of `dpquant plan` and `dpquant train`: the only place for their names, defaults, help and ranges.

Settings that are not given get defaults that depend on others: `defaults.py`. `policy_of` and `plan_of` build the run's
policy and privacy plan. Importing this file loads neither torch nor the accountant.
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

from dpquant.data.model_names import check_name
from dpquant.data.normalisation import normalisation_of
from dpquant.data.sizes import public_size
from dpquant.errors import FormatError, SettingError
from dpquant.formats import AUTO, precision
from dpquant.runs.declared import checked
from dpquant.runs.defaults import EPOCH_STEPS, defaults
from dpquant.runs.effects import check_contradictions, check_effects, has_effect
from dpquant.runs.ranges import CHOICES, RANGES, check_choice, check_range, check_type, unknown
from dpquant.runs.source_settings import SourceSettings, setting
from dpquant.runs.toml import toml_of

if TYPE_CHECKING:
    from dpquant.privacy.analysis_plan import Score
    from dpquant.privacy.plan import NoiseLaw, PrivacyPlan
    from dpquant.training.policies import Policy

_ANALYSIS_PARTS = {"loss": 1 / 2, "gradient": 1 / 16}  # of a step's batch: a gradient costs more and says more
_ANALYSIS_NORMS = {"loss": 0.25, "gradient": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(SourceSettings):
    """All settings of `dpquant train`. Build them with `chosen`, which adds the defaults of the data set.

    Raises:
      SettingError: a value is out of range, or two values contradict each other.
    """

    epsilon: float | None = setting("privacy budget, training and analysis together [8, unless noise is given]")
    noise_multiplier: float | None = setting("noise over sensitivity, instead of epsilon")
    noise: str = setting("gaussian, or discrete: slower, exact to the last bit of what is released", "gaussian")
    delta: float = setting("of the (epsilon, delta) guarantee; choose it far below 1 / records")
    max_grad_norm: float = setting("L2 norm that each example's gradient is clipped to")
    epochs: int = setting("passes over the data, on average")
    batch_size: float = setting("expected size of a Poisson batch")
    sample_rate: float | None = setting("each record's probability to be drawn [batch size / records]")
    records: int | None = setting("public, if need be approximate, number of training records")
    records_per_person: int | None = setting("public number of records that a person has at most, for the statement")
    optimizer: str = setting("sgd, adam or adamw")
    lr: float = setting("learning rate")
    momentum: float = setting("of sgd")
    weight_decay: float = setting("of the optimizer", 0.0)
    lr_schedule: str = setting("constant, linear (to zero) or cosine (to zero)", "constant")
    average: float = setting("weight of the past in an average of the parameters, which is tested and saved", 0.0)
    policy: str = setting("none, all, static, rotate, prioritise or dpquant [dpquant; all if format is auto or int8]")
    fraction: float | None = setting("share of the layers that run quantized [0.75, unless macs is given]")
    macs: float | None = setting("share of the multiply-accumulates that run quantized, instead of fraction")
    layers: str | None = setting("names, with commas between them, of policy static's layers, instead of fraction")
    beta: float = setting("how much impact counts against chance, 0 = rotation", 3.0)
    ema: float = setting("weight of the newest analysis", 0.5)
    format: str = setting(
        "of a quantized layer: auto (what this machine gains by), luq-fp4, luq, int4-clip, int8, fp8, mxfp4, nvfp4, or "
        "three for its products [auto; luq-fp4 if a policy is given]"
    )
    rest: str = setting("format of the other layers: full/luq-fp4/luq-fp4 quantizes their backward pass", "full")
    backend: str = setting("auto, simulate, int8 or cuda", "auto")
    device: str = setting("auto (a GPU if there is one), cpu, cuda or cuda:N", "auto")
    analysis_every: int = setting("epochs between analyses", 1)
    analysis_score: str = setting("what quantizing is measured by: loss, or gradient, its direction", "gradient")
    analysis_batch_size: float | None = setting(
        "expected size of an analysis' batch [a sixteenth of the batch size; loss half]"
    )
    analysis_noise_multiplier: float = setting("noise over sensitivity of an analysis", 1.0)
    analysis_max_norm: float | None = setting("L2 norm that each example's impacts are clipped to [1; loss 0.25]")
    analysis_repeats: int = setting("roundings averaged in an analysis", 1)
    seed: int = setting(
        "of the model's first parameters and of the schedule; public, so no other draw follows from it", 0
    )
    threads: int | None = setting("threads to compute with [all cores]")
    microbatch_size: int | None = setting("examples a backward pass [the fastest, measured]")
    memory: float | None = setting(
        "GiB that the process, or its tensors on a GPU, may use at most, by which microbatch-size is chosen"
    )
    choices: str | None = setting("file of what an earlier run has measured on its machine: its choices.json")
    exact_sums: bool = setting("the same bits for any number of processes: microbatches are added as integers", False)
    shard_optimizer: bool = setting("each of several processes holds its part of the optimizer's state alone", False)
    checkpoint_every: str | None = setting(
        "as 2epochs, 100steps or 10minutes [an epoch or five minutes, if that costs less than 2 % of the time]"
    )
    unsafe_metrics: bool = setting("also measure training accuracy, which is NOT private", False)
    track: str | None = setting("trackers that are told of the run, with commas: tensorboard, mlflow, or others")
    track_model: bool = setting("also hand the model to trackers that keep files", False)
    track_unsafe: bool = setting("also tell trackers what the privacy statement does not cover", False)
    declared: Mapping[str, str] | None = setting("your words for the report, a table [declared]", option=False)

    @classmethod
    def chosen(cls, given: Mapping[str, Any], file: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """Return the given settings, with the data set's defaults for the others.

        Args:
          given: {name: value}.
          file: settings of a file, for what is not in `given`.
        Raises:
          SettingError: a name is unknown, a value has the wrong type or is out of range, or a given setting has no
            effect beside the others.
        """
        both = {**file, **given}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in both.items():
            if name not in fields:
                raise SettingError(unknown(name, value, fields))
            if name != "declared":
                check_type(name, value, str(fields[name].type))
            if name in RANGES and value is not None:
                check_range(name, value)
        usual = {name: default.value for name, default in defaults(both).items()}
        settings = cls(**{**usual, **both})
        check_effects(given, file, {name: usual.get(name, field.default) for name, field in fields.items()})
        return settings

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.checkpoint_every is not None:
            _interval(self.checkpoint_every)
        for name in RANGES:
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name))
        check_contradictions(vars(self))
        check_name(self.model)
        if self.normalize is not None:
            normalisation_of(self.normalize)
        if self.declared is not None:
            object.__setattr__(self, "declared", checked(self.declared) or None)
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise SettingError(
                f"Expected device to be auto, cpu, cuda or cuda:N; got device={self.device}. See dpquant train --help."
            )
        for name in ("format", "rest"):
            if name == "format" and self.format == AUTO:
                continue
            try:
                precision(getattr(self, name))
            except FormatError as error:
                raise SettingError(re.sub(r"\bformat\b", name, str(error))) from error

    @property
    def public_records(self) -> int | None:
        """Public number of training records, given or published; None if there is none.

        Raises: DataError: the data set is unknown.
        """
        published = public_size(self.data)
        return published if self.records is None else self.records

    def to_toml(self) -> str:
        """Return all settings that have an effect and are not None, as TOML that `from_toml` reads."""
        lines = ["# dpquant train --config FILE runs this again."]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and has_effect(field.name, vars(self)):
                lines += [f"{field.name} = {toml_of(value)}"] if field.name != "declared" else ["", "[declared]"]
        lines += [f"{name} = {toml_of(words)}" for name, words in (self.declared or {}).items()]
        return "\n".join(lines) + "\n"


def from_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file, unchecked.

    Raises:
      SettingError: the file cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(
            f"Expected a readable TOML file of settings; got {path}: {error}. Check the path."
        ) from error


def policy_of(settings: TrainSettings) -> "Policy":
    """Return the policy that the settings name."""
    from dpquant.training import policies

    fraction, macs = settings.fraction, settings.macs
    match settings.policy:
        case "none":
            return policies.NonePolicy()
        case "all":
            return policies.AllPolicy()
        case "static":
            names = None if settings.layers is None else tuple(name.strip() for name in settings.layers.split(","))
            return policies.StaticPolicy(fraction=fraction, macs=macs, names=names, seed=settings.seed)
        case "rotate":
            return policies.RotatePolicy(fraction=fraction, macs=macs)
        case "prioritise":
            return policies.PrioritisePolicy(fraction=fraction, macs=macs, ema=settings.ema)
        case _:
            return policies.DPQuantPolicy(fraction=fraction, macs=macs, beta=settings.beta, ema=settings.ema)


def plan_of(settings: TrainSettings) -> "PrivacyPlan":
    """Return the privacy plan of a run, computed from public numbers. Reads no data.

    Raises:
      SettingError: the number of records is neither public nor given, or a privacy setting is out of range.
      DataError: the data set is unknown.
    """
    from dpquant.privacy.analysis_plan import AnalysisPlan
    from dpquant.privacy.plan import PrivacyPlan  # loads the accountant, which --help does without
    from dpquant.privacy.ranges import MOST_STEPS

    records = settings.public_records
    if settings.sample_rate is None and records is None:
        raise SettingError(
            f"Expected records or sample_rate for data={settings.data}; got neither. The size of a private data set is "
            "itself private, so it is not counted. Give a public number: --records, which may be approximate, or "
            "--sample-rate."
        )
    score, max_norm = cast("Score", settings.analysis_score), settings.analysis_max_norm
    analysis_batch = settings.analysis_batch_size or settings.batch_size * _ANALYSIS_PARTS[score]
    rate = settings.sample_rate or settings.batch_size / (records or 1)
    if rate > 1 or rate * analysis_batch > settings.batch_size:
        raise SettingError(
            f"Expected batch_size and analysis_batch_size of at most {settings.batch_size / rate:g}, the records; got "
            f"batch_size={settings.batch_size:g}, analysis_batch_size={analysis_batch:g}. A record is drawn with "
            "probability batch size over records. Give smaller batches.",
            instead=_batches_for(settings, settings.batch_size / rate),
        )
    epoch_steps = max(1, round(1 / rate))
    if settings.epochs * epoch_steps > MOST_STEPS:
        raise SettingError(
            f"Expected epochs of at most {MOST_STEPS // epoch_steps}; got epochs={settings.epochs}, of {epoch_steps} "
            f"steps each. The budget is computed for up to {MOST_STEPS:,} steps. Give fewer epochs, or larger batches."
        )
    analysis = None
    if policy_of(settings).needs_scores:
        analysis = AnalysisPlan(
            count=-(-settings.epochs // settings.analysis_every),
            sample_rate=rate * analysis_batch / settings.batch_size,
            expected_batch_size=analysis_batch,
            noise_multiplier=settings.analysis_noise_multiplier,
            max_norm=_ANALYSIS_NORMS[score] if max_norm is None else max_norm,
            repeats=settings.analysis_repeats,
            score=score,
        )
    return PrivacyPlan(
        epsilon=settings.epsilon,
        noise_multiplier=settings.noise_multiplier,
        delta=settings.delta,
        max_grad_norm=settings.max_grad_norm,
        sample_rate=rate,
        expected_batch_size=settings.batch_size,
        steps=settings.epochs * epoch_steps,
        analysis=analysis,
        noise=cast("NoiseLaw", settings.noise),
        records_per_person=settings.records_per_person,
    )


def _batches_for(settings: TrainSettings, records: float) -> dict[str, float]:
    """Return batch sizes that fit the records, for those settings that do not."""
    fits = settings.batch_size <= records
    size = settings.batch_size if fits else max(1.0, round(records / EPOCH_STEPS))
    found = {} if fits else {"batch_size": size}
    if settings.analysis_batch_size is not None and settings.analysis_batch_size > size:
        found["analysis_batch_size"] = size
    return found


_INTERVAL = re.compile(r"(\d+(?:\.\d+)?) ?(epoch|step|minute)s?")
_LOST_AT_MOST = 300.0  # seconds of training, by default
_SHARE = 0.02  # of the time, which checkpoints may take by default


def checkpoint_steps(settings: TrainSettings, plan: "PrivacyPlan", step_seconds: float, write_seconds: float) -> int:
    """Return the number of steps from one checkpoint to the next.

    It is fixed at the start from public times, because a real step's time depends on how many records it drew.

    Args:
      settings: of the run.
      plan: of the run.
      step_seconds: time of a step on synthetic records.
      write_seconds: time that a checkpoint takes.
    """
    step_seconds = max(step_seconds, 1e-6)
    if settings.checkpoint_every is None:
        wanted = min(plan.epoch_steps, _LOST_AT_MOST / step_seconds)
        return math.ceil(max(wanted, write_seconds / (_SHARE * step_seconds), 1))
    number, unit = _interval(settings.checkpoint_every)
    steps = {"epoch": plan.epoch_steps, "step": 1, "minute": 60 / step_seconds}[unit]
    return max(1, math.ceil(number * steps))


def _interval(text: str) -> tuple[float, str]:
    """Return number and unit of `checkpoint_every`; raise SettingError if it has no such form."""
    match = _INTERVAL.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise SettingError(
            f"Expected checkpoint_every to be a number of epochs, steps or minutes, as 2epochs; got "
            f"checkpoint_every={text!r}. See dpquant train --help."
        )
    return float(match[1]), match[2]
