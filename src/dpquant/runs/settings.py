# SPDX-License-Identifier: Apache-2.0
"""Settings of `dpquant plan` and `dpquant train`: the only place for their names, defaults, help and ranges.

Settings that are not given get the defaults of the data set: `BY_DATA` has values that were found to work for some data
sets, `GENERAL` those for the others. `policy_of` and `plan_of` build the run's policy and privacy plan. Importing this
file loads neither torch nor the accountant.
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

from dpquant.data.manifest import kind_of
from dpquant.data.sizes import OWN_PREFIXES, PACKED_PREFIX, TABLE_PREFIX, TEXT_PREFIX, public_size
from dpquant.errors import FormatError, SettingError, did_you_mean
from dpquant.formats import precision
from dpquant.runs.declared import checked
from dpquant.runs.effects import check_contradictions, check_effects, has_effect
from dpquant.runs.source_settings import AUGMENTS, SOURCE_RANGES, Range, SourceSettings, setting
from dpquant.runs.toml import toml_of

if TYPE_CHECKING:
    from dpquant.privacy.plan import NoiseLaw, PrivacyPlan, Score
    from dpquant.training.policies import Policy

OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCHEDULES = ("constant", "linear", "cosine")
POLICIES = ("none", "all", "static", "rotate", "prioritise", "dpquant")
BACKENDS = ("auto", "simulate", "int8", "cuda")
ANALYSIS_SCORES = ("loss", "gradient")
NOISES = ("gaussian", "discrete")

_ANALYSIS_PARTS = {"loss": 1 / 2, "gradient": 1 / 16}  # of a step's batch: a gradient costs more and says more
_ANALYSIS_NORMS = {"loss": 0.25, "gradient": 1.0}

GENERAL: Mapping[str, Any] = {
    "model": "resnet18-cifar",
    "epochs": 20,
    "batch_size": 1024.0,
    "delta": 1e-5,
    "max_grad_norm": 1.0,
    "optimizer": "adam",
    "lr": 1e-3,
    "momentum": 0.0,
}
_FASHION: Mapping[str, Any] = {
    "model": "cnn",
    "epochs": 25,
    "batch_size": 2048.0,
    "max_grad_norm": 0.1,
    "optimizer": "sgd",
    "lr": 4.0,
    "momentum": 0.9,
}
BY_DATA: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "model": "cnn",
        "epochs": 40,
        "batch_size": 256.0,
        "delta": 1e-4,
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
    },
    "mnist": _FASHION,
    "fashion-mnist": _FASHION,
    TABLE_PREFIX: {"model": "mlp"},
    TEXT_PREFIX: {"model": "embedding-mean", "max_length": 128},
}


_OF_PACKED: Mapping[str | None, Mapping[str, Any]] = {
    "rows": BY_DATA[TABLE_PREFIX],
    "texts": {"model": BY_DATA[TEXT_PREFIX]["model"]},
}


def _by_data(data: str) -> Mapping[str, Any]:
    """Return the defaults of a data set, by its name, its kind of file or, of packed records, its manifest."""
    if data.startswith(PACKED_PREFIX):
        return _OF_PACKED.get(kind_of(data), {})
    return BY_DATA.get(next((prefix for prefix in OWN_PREFIXES if data.startswith(prefix)), data), {})


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
    policy: str = setting("none, all, static, rotate, prioritise or dpquant", "dpquant")
    fraction: float | None = setting("share of the layers that run quantized [0.75, unless macs is given]")
    macs: float | None = setting("share of the multiply-accumulates that run quantized, instead of fraction")
    layers: str | None = setting("names, with commas between them, of policy static's layers, instead of fraction")
    beta: float = setting("how much impact counts against chance, 0 = rotation", 3.0)
    ema: float = setting("weight of the newest analysis", 0.5)
    format: str = setting(
        "of a quantized layer: luq-fp4, luq, int4-clip, int8, fp8, mxfp4, nvfp4, or three for its products", "luq-fp4"
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
    checkpoint_every: str | None = setting(
        "as 2epochs, 100steps or 10minutes [an epoch or five minutes, if that costs less than 2 % of the time]"
    )
    unsafe_metrics: bool = setting("also measure training accuracy, which is NOT private", False)
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
                raise SettingError(_unknown(name, value, fields))
            if name != "declared":
                _check_type(name, value, str(fields[name].type))
        budget = {} if both.get("noise_multiplier") is not None else {"epsilon": 8.0}
        named = both.get("macs") is not None or both.get("layers") is not None
        share = {} if named else {"fraction": 0.75}
        defaults = {**GENERAL, **_by_data(both.get("data", cls.data)), **budget, **share}
        settings = cls(**{**defaults, **both})
        check_effects(given, file, {name: defaults.get(name, field.default) for name, field in fields.items()})
        return settings

    def __post_init__(self) -> None:
        for name, allowed in {
            "optimizer": OPTIMIZERS,
            "lr_schedule": LR_SCHEDULES,
            "policy": POLICIES,
            "backend": BACKENDS,
            "analysis_score": ANALYSIS_SCORES,
            "noise": NOISES,
            "augment": AUGMENTS,
        }.items():
            _check_choice(name, getattr(self, name), allowed)
        if self.checkpoint_every is not None:
            _interval(self.checkpoint_every)
        for name, (rule, holds) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise SettingError(f"Expected {name} {rule}; got {name}={value}. See dpquant train --help.")
        check_contradictions(vars(self))
        if self.declared is not None:
            object.__setattr__(self, "declared", checked(self.declared) or None)
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise SettingError(
                f"Expected device to be auto, cpu, cuda or cuda:N; got device={self.device}. See dpquant train --help."
            )
        for name in ("format", "rest"):
            try:
                precision(getattr(self, name))
            except FormatError as error:
                raise SettingError(re.sub(r"\bformat\b", name, str(error))) from error

    @property
    def public_records(self) -> int | None:
        """Public number of training records, given or published; None if there is none."""
        return public_size(self.data) if self.records is None else self.records

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
        return tomllib.loads(path.read_text())
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
    from dpquant.privacy.plan import AnalysisPlan, PrivacyPlan  # loads the accountant, which --help does without
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
            "probability batch size over records. Give smaller batches."
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


_AT_LEAST_ONE: Range = (">= 1", lambda x: x >= 1)
_POSITIVE: Range = ("> 0 and finite", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE: Range = (">= 0 and finite", lambda x: 0 <= x < math.inf)
_RANGES: Mapping[str, Range] = {
    **SOURCE_RANGES,
    "epochs": _AT_LEAST_ONE,
    "batch_size": _POSITIVE,
    "sample_rate": ("in (0, 1]", lambda x: 0 < x <= 1),
    "records_per_person": ("in 1 .. 64", lambda x: 1 <= x <= 64),
    "records": ("in 1 .. 10^12", lambda x: 1 <= x <= 10**12),
    "lr": _POSITIVE,
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "average": ("in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "analysis_every": _AT_LEAST_ONE,
    "analysis_batch_size": _POSITIVE,
    "seed": ("in 0 .. 2^63 - 1", lambda x: 0 <= x < 2**63),
    "threads": ("in 1 .. 4096", lambda x: 1 <= x <= 4096),
    "microbatch_size": _AT_LEAST_ONE,
    "memory": _POSITIVE,
}


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Check that a value has the type of the field's annotation; an int is accepted for a float."""
    names = annotation.replace("<class '", "").replace("'>", "").split(" | ")
    allowed = tuple({"str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)}[n] for n in names)
    if not isinstance(value, allowed) or (isinstance(value, bool) and "bool" not in names):
        raise SettingError(f"Expected {name} of type {annotation}; got {name}={value!r}. See dpquant train --help.")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(
            f"Expected {name} to be one of {', '.join(allowed)}; got {name}={value}. {did_you_mean(value, allowed)}See "
            "dpquant train --help."
        )


def _unknown(name: str, value: Any, known: Iterable[str]) -> str:
    """Return the error for a setting that does not exist."""
    if isinstance(value, dict):
        return (
            f"Expected settings outside of tables; got a table [{name}]. Settings have no groups. Write them as lines "
            "NAME = VALUE, above any table."
        )
    hint = did_you_mean(name, known)
    return f"Expected known settings; got {name}. It would be ignored. {hint}See dpquant train --help."
