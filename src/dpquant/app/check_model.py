# SPDX-License-Identifier: Apache-2.0
"""`dpquant check-model`: everything for which a run would refuse a model, at once, and a table of its layers.

A run stops at the first error. Here all of them are collected: modules of types that mix examples, outputs that do not
fit the classes, a model that cannot be saved, and the check on synthetic records that `checks/isolation.py` makes, in
full precision and quantized. Where a module's type is refused already, that check is made on a copy in which such
modules are replaced or frozen, so that it shows what else there is.

No record is read: of a data set only the shape of an input and the number of classes are used.
"""

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from dpquant.app.form import specimens_of
from dpquant.checks.codes import check_quantized
from dpquant.checks.isolation import Findings, check_isolation
from dpquant.checks.refusals import Refusal, refusals
from dpquant.checks.synthetic import Specimens
from dpquant.data.form import Form
from dpquant.engine.convert import fix
from dpquant.engine.layers import count_macs, prepare, quantizable_layers, quantizable_twin
from dpquant.engine.passes import Objective
from dpquant.errors import DPQuantError, ModelError
from dpquant.formats import Precision, precision
from dpquant.runs.directory import RunDirectory
from dpquant.runs.evaluation import evaluating, loss_of
from dpquant.runs.objects import blank_of, check_outputs

_QUANTIZABLE = (nn.Conv2d, nn.Linear)
_WITHOUT_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_COUNTED = (nn.Linear, nn.modules.conv._ConvNd)
_FULL, _QUANTIZED = "full precision", "quantized"
_PROBES: tuple[str, ...] = _FULL, _QUANTIZED
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"

_Result = TypeVar("_Result")

Isolate = Callable[[Objective, Iterator[Specimens]], Findings]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that has to change before the model can be trained.

    Attributes:
      stage: `type` of a module, `outputs`, `saving`, `full precision`, `quantized`, `preparing` or `fix`.
      module, kind: path and class of the module; empty where it is the model.
      modules: number of modules of which the same is to be said; `module` is the first.
      problem: what is wrong and why it matters; with `fix` None also what to do.
      fix: what to do.
    """

    stage: str
    module: str = ""
    kind: str = ""
    problem: str
    fix: str | None = None
    modules: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A module that has parameters of its own.

    Attributes:
      name, kind: path and class of the module.
      parameters: number of its own, those that an earlier module has as well left out.
      macs: multiply-accumulates for one example; None where they are not counted.
      format: in which the layer runs if a policy chooses it; None: it never runs quantized.
      reason: why it never runs quantized; empty if it may.
      notes: what else is to be known: frozen, shared.
    """

    name: str
    kind: str
    parameters: int
    macs: float | None
    format: str | None
    reason: str
    notes: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """Result of `dpquant check-model`.

    Attributes:
      model: as it was named.
      input_shape: of one input.
      num_classes: number of classes.
      vocabulary: number of tokens; None where inputs are no texts.
      format: in which the model was tried quantized.
      findings: everything for which a run would refuse the model.
      probe: {`full precision`, `quantized`: `passed`, `failed` or `not run`}.
      probed: on what the probe was run: the model, or a copy in which refused modules are replaced or frozen; if it was
        not run, why.
      layers: all modules with parameters of their own.
      fixed_model: the model after `fix`, as torch prints it; None if it was not asked for.
    """

    model: str
    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary: int | None
    format: str
    findings: Sequence[Finding]
    probe: dict[str, str]
    probed: str
    layers: Sequence[Layer]
    fixed_model: str | None

    @property
    def passed(self) -> bool:
        """Whether nothing has to change."""
        return not self.findings

    def to_json(self) -> str:
        """Return the result as JSON."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=2) + "\n"


def check_model(
    model: nn.Module,
    form: Form,
    *,
    name: str = "",
    format: str = "luq-fp4",
    fixed: bool = False,
    isolate: Isolate = check_isolation,
) -> ModelCheck:
    """Collect everything for which a run would refuse a model, and describe its layers.

    Args:
      model: of the user, not prepared. It is changed: give one that is not used afterwards.
      form: of the records.
      name: of the model, for the result.
      format: of quantized layers.
      fixed: first replace what `dpquant.fix` can replace.
      isolate: runs the model on synthetic records, as `checks.isolation.check_isolation`.
    Returns: the result.
    Raises:
      FormatError: the format is unknown.
    Privacy: reads no data.
    """
    chosen = precision(format)
    found: list[Finding] = []
    if fixed:
        model = _tried(found, "fix", lambda: fix(model)) or model
    shown = str(model) if fixed else None
    static = refusals(model)
    found += _of_types(static)
    runs = _runs(model, form, found)
    layers = _layers(model, form if runs else None, chosen)
    subject, probed, probe = None, "the model does not run", dict.fromkeys(_PROBES, NOT_RUN)
    if runs:
        _tried(found, "saving", lambda: _save(model))
        subject, probed = _mended(model, static) if static else (model, "the model")
    if subject is not None:
        prepared = _tried(found, "preparing", functools.partial(prepare, subject, format=chosen))
        probed = probed if prepared is not None else "it cannot be prepared"
        probe |= {} if prepared is None else _probe(prepared, form, chosen, found, isolate)
    return ModelCheck(
        model=name,
        input_shape=form.input_shape,
        num_classes=form.num_classes,
        vocabulary=form.vocabulary,
        format=chosen.name,
        findings=found,
        probe=probe,
        probed=probed,
        layers=layers,
        fixed_model=shown,
    )


def _of_types(static: Sequence[Refusal]) -> list[Finding]:
    """Return one finding for all modules of a class of which the same is wrong."""
    alike: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in static:
        alike.setdefault((refusal.kind, refusal.problem, refusal.remedy), []).append(refusal)
    return [
        Finding(stage="type", module=first.module, kind=kind, problem=problem, fix=remedy, modules=1 + len(others))
        for (kind, problem, remedy), (first, *others) in alike.items()
    ]


def _tried(found: list[Finding], stage: str, work: Callable[[], _Result]) -> _Result | None:
    """Return what the work gives; add a finding and return None if it is refused."""
    try:
        return work()
    except DPQuantError as error:
        found.append(Finding(stage=stage, problem=str(error)))
        return None


def _runs(model: nn.Module, form: Form, found: list[Finding]) -> bool:
    """Return whether the model runs on blank inputs; add a finding if not, or if it does not give a logit a class."""
    try:
        check_outputs(model, form)
    except ModelError as error:
        found.append(Finding(stage="outputs", problem=str(error)))
        return error.__cause__ is None  # it runs, and gives outputs of another shape
    return True


def _save(model: nn.Module) -> None:
    """Save the model to a temporary file as a run would, and load it back."""
    with tempfile.TemporaryDirectory() as folder:
        RunDirectory(Path(folder)).try_saving(model)


def _mended(model: nn.Module, static: Sequence[Refusal]) -> tuple[nn.Module | None, str]:
    """Return a copy in which nothing is refused by its type, and what was done; None and why not, if there is none."""
    try:
        model = copy.deepcopy(model)
        modules = dict(model.named_modules())
        for refusal in static:
            if not isinstance(modules[refusal.module], nn.modules.batchnorm._NormBase):
                modules[refusal.module].requires_grad_(False)
        model = fix(model)
    except Exception as error:  # a user's module may refuse to be copied in any way
        return None, f"what is refused cannot be replaced or frozen in a copy ({type(error).__name__})"
    if left := refusals(model):
        return None, f"freezing does not mend {left[0].module or 'the model'} ({left[0].kind})"
    return model, "a copy in which refused normalizations are replaced and other refused modules frozen"


def _probe(model: nn.Module, form: Form, chosen: Precision, found: list[Finding], isolate: Isolate) -> dict[str, str]:
    """Run the live check in full precision, then quantized; add what it finds, and return how each went."""
    facts = _tried(found, _FULL, lambda: isolate(Objective(model, loss_of(form.task)), specimens_of(form)))
    if facts is None:
        return {_FULL: FAILED}
    if not quantizable_layers(model):
        return {_FULL: PASSED}

    def quantized() -> bool:
        check_quantized(facts.objective, facts.specimens, facts.others(), [chosen])
        return True

    return {_FULL: PASSED, _QUANTIZED: PASSED if _tried(found, _QUANTIZED, quantized) else FAILED}


def _layers(model: nn.Module, form: Form | None, chosen: Precision) -> list[Layer]:
    """Describe all modules that have parameters of their own; multiply-accumulates are counted on a blank input."""
    own = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    macs: dict[str, float] = {}
    if form is not None:
        counted = {name: m for name, m in own.items() if isinstance(m, _COUNTED) and not getattr(m, "transposed", 0)}
        with evaluating(model):
            macs = count_macs(model, lambda: model(blank_of(form, 1)), layers=counted)
    owners: dict[nn.Parameter, str] = {}
    rows = []
    for name, module in own.items():
        mine = dict(module.named_parameters(recurse=False))
        shared = {owners[p]: None for p in mine.values() if p in owners}
        frozen = not any(p.requires_grad for p in mine.values())
        notes = [*(["frozen"] if frozen else []), *(f"shares parameters with {other}" for other in shared)]
        reason = _why_not(module)
        rows.append(
            Layer(
                name=name,
                kind=type(module).__name__,
                parameters=sum(p.numel() for p in mine.values() if p not in owners and not is_lazy(p)),
                macs=macs.get(name),
                format=None if reason else chosen.name,
                reason=reason,
                notes=", ".join(notes),
            )
        )
        owners |= {p: name for p in mine.values() if p not in owners}
    return rows


def _why_not(module: nn.Module) -> str:
    """Return why a module never runs quantized; empty if it may."""
    if quantizable_twin(type(module)) is not None:
        return ""
    if isinstance(module, _QUANTIZABLE):
        return f"a subclass, which need not compute what {type(module).__mro__[1].__name__} does"
    if isinstance(module, _WITHOUT_PRODUCT) or all(p.ndim < 2 for p in module.parameters(recurse=False)):
        return "no matrix product"
    return "no quantized product for layers of its kind"
