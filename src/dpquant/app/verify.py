# SPDX-License-Identifier: Apache-2.0
"""`dpquant verify`: recomputes everything in a run directory that can be recomputed. This module loads no torch.

The ledger is the only source that cannot be edited in one place: its lines are chained by hashes, and the record names
the hash of the last one. From it follow the counts and every epsilon. The plan follows from the settings, the
shares of quantized work from the layers of each epoch, the hash of the model from its file. What cannot be recomputed
without the data, as the test accuracy, is compared between the files that state it.

Privacy: post-processing of what the run has released.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpquant.errors import DPQuantError, LedgerError, SettingError
from dpquant.formats import AUTO
from dpquant.privacy import accounting, releases
from dpquant.privacy.entries import Contents
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.plan import rounded_up
from dpquant.runs.description import ModelDescription
from dpquant.runs.evaluated import Evaluation
from dpquant.runs.names import CONFIG, DESCRIPTION, EVALUATION, LEDGER, METRICS, MODEL, RECORD, RELEASES, REPORT, SPENT
from dpquant.runs.place import Place
from dpquant.runs.provenance import PlanRecord
from dpquant.runs.record import RunRecord, metrics_line, sha256
from dpquant.runs.settings import TrainSettings, plan_of

_ROUND_OFF = 1e-6  # of epsilon, which versions of the accountant compute slightly differently
_SAME_NAME = ("model", "policy", "format", "rest", "optimizer", "lr", "average", "seed", "max_grad_norm", "delta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked.

    Attributes:
      what: was compared, in words.
      holds: whether it is as it should be.
      detail: what was found; where it does not hold, what was expected and what it means.
    """

    what: str
    holds: bool
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `dpquant verify`.

    Attributes:
      run: directory of the run.
      findings: everything that was checked, in order.
      skipped: what an older record does not hold, and so was not checked.
    """

    run: str
    findings: list[Finding]
    skipped: list[str]

    @property
    def holds(self) -> bool:
        """Whether everything that was checked is as it should be."""
        return all(one.holds for one in self.findings)

    def to_json(self) -> str:
        """Return the result as JSON."""
        return json.dumps({"holds": self.holds, **dataclasses.asdict(self)}, indent=2) + "\n"


def verify(run: Path, *, report: bool = True) -> Verification:
    """Recompute what a run directory says.

    Args:
      run: directory of a run that has ended.
      report: check the report in it as well.
    Raises:
      SettingError: it is no run, or a run that has not ended.
      DataError: its record cannot be read.
    Privacy: post-processing.
    """
    place = Place(run)
    settings = place.settings()
    if not (run / RECORD).is_file():
        raise SettingError(
            f"Expected a run that has ended; got {run}, which holds no {RECORD}. What it has charged is verified by "
            f"dpquant ledger {run}. It is continued by: dpquant resume {run}"
        )
    record = RunRecord.read(run / RECORD)
    skipped = [name for name in ("plan", "ledger", "model_sha256") if getattr(record, name) is None]
    findings = [*_ledger_and_epsilon(run, record), *_settings(settings, record), *_model(run, record)]
    findings += [*_epochs(run, record), *_evaluation(run, record), *(_report(run) if report else [])]
    return Verification(run=str(run), findings=findings, skipped=skipped)


def _equal(what: str, found: Any, expected: Any, source: str) -> Finding:
    """Return a finding about a value of the record, which should be as another source says."""
    holds = found == expected or (
        isinstance(found, float)
        and isinstance(expected, float)
        and math.isclose(found, expected, rel_tol=_ROUND_OFF, abs_tol=1e-12)
    )
    detail = _shown(found) if holds else f"{RECORD} says {_shown(found)}, {source} says {_shown(expected)}"
    return Finding(what=what, holds=holds, detail=detail)


def _shown(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _ledger_and_epsilon(run: Path, record: RunRecord) -> Iterator[Finding]:
    """Verify the chain, and what follows from it."""
    exported = not (run / LEDGER).is_file() and (run / SPENT).is_file()
    try:
        contents = _summary(run / SPENT) if exported else _lines(run)
    except LedgerError as error:
        yield Finding(what="ledger: chain of hashes", holds=False, detail=str(error))
        return
    yield Finding(
        what="ledger: summary of an export" if exported else "ledger: chain of hashes",
        holds=True,
        detail=f"its lines stay with the operator, head {contents.head}"
        if exported
        else f"{contents.num_lines} lines, head {contents.head}",
    )
    if record.ledger is not None:
        yield _equal("ledger: head", record.ledger.head, contents.head, LEDGER)
        yield _equal("ledger: events", _counted(record.ledger.events), _counted(contents.events), LEDGER)
    if record.provenance is not None:
        yield _equal("ledger: run", record.provenance.run_id, contents.run, LEDGER)
    yield from _budget(record, contents)
    yield _equal("epsilon", record.epsilon, accounting.epsilon(contents.events, record.delta), LEDGER)
    share = accounting.analysis_share(contents.events, record.delta)
    if math.isclose(record.epsilon_analysis_share, share, abs_tol=10 * _ROUND_OFF):  # a difference of two epsilons
        share = record.epsilon_analysis_share
    yield _equal("epsilon: share of analyses", record.epsilon_analysis_share, share, LEDGER)
    if record.epsilon_rdp is not None:
        rdp = accounting.epsilon(contents.events, record.delta, "rdp")
        yield _equal("epsilon: Renyi accounting", record.epsilon_rdp, rdp, LEDGER)
    yield _statement(record)
    if contents.research and "NOT PRIVATE" not in record.statement:
        yield Finding(
            what="statement", holds=False, detail="the ledger has charges of a known seed, and it is not NOT PRIVATE"
        )


def _lines(run: Path) -> Contents:
    """Return what a run's ledger says, every line of it verified; raise a LedgerError if it is not there."""
    if not (run / LEDGER).is_file():
        raise LedgerError(
            f"Expected the ledger of the run; got {run}, which holds no {LEDGER}. Without it no epsilon can be stated. "
            "Restore it from a copy."
        )
    return Ledger.verify(run / LEDGER)


def _summary(path: Path) -> Contents:
    """Return what an export says of its run's ledger; raise a LedgerError if it cannot be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        events = [Event(**event) for event in fields["events"]]
        return Contents(
            format=fields["format"],
            run=fields["run"],
            head=fields["head"],
            events=events,
            research=fields["research"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LedgerError(
            f"Expected {path} to say what a ledger has charged; got {type(error).__name__}. Restore it from a copy."
        ) from error


def _counted(events: Any) -> list[str]:
    return sorted(
        f"{one.count} {one.kind}, sample rate {one.sample_rate:.10g}, noise {one.noise_multiplier:.10g}"
        for one in events
    )


def _budget(record: RunRecord, contents: Contents) -> Iterator[Finding]:
    """Compare the ledger's plan with the record's, and what was charged with what was planned."""
    if contents.budget is None:
        return
    yield _equal("plan: delta", record.delta, contents.budget.delta, LEDGER)
    planned = {one.kind: one.count for one in contents.budget.events}
    over = [kind for kind in ("train", "analysis") if contents.charged(kind) > planned.get(kind, 0)]
    yield Finding(
        what="plan: charges within it",
        holds=not over,
        detail=f"{contents.charged('train')} of {planned.get('train', 0)} steps, "
        f"{contents.charged('analysis')} of {planned.get('analysis', 0)} analyses",
    )
    if record.plan is not None and math.isfinite(contents.budget.epsilon):
        yield _equal("plan: epsilon", record.plan.epsilon, contents.budget.epsilon, LEDGER)


def _statement(record: RunRecord) -> Finding:
    """The numbers in the first sentence of the statement are the record's."""
    found = re.search(r"epsilon = (\S+) and delta = ([^,\s]+)", record.statement)
    expected = (rounded_up(record.epsilon), f"{record.delta:g}")
    told = None if found is None else (found[1], found[2])
    return Finding(
        what="statement: epsilon and delta",
        holds=told == expected,
        detail=f"epsilon = {expected[0]}, delta = {expected[1]}"
        if told == expected
        else f"it says {told}, not {expected}",
    )


def _settings(settings: TrainSettings, record: RunRecord) -> Iterator[Finding]:
    """Compare settings and record, and compute the plan again."""
    taken = {"format": record.format} if settings.format == AUTO else {}  # the record says what auto took
    differ = [name for name in _SAME_NAME if taken.get(name, getattr(settings, name)) != getattr(record, name)]
    differ += ["data"] if settings.data != record.dataset else []
    detail = ", ".join(f"{name} differs" for name in differ) or f"{CONFIG} and {RECORD} agree"
    yield Finding(what="settings", holds=not differ, detail=detail)
    try:
        plan = PlanRecord.of(plan_of(settings))
    except DPQuantError as error:
        yield Finding(what="plan: from the settings", holds=False, detail=f"{CONFIG} gives no plan: {error}")
        return
    for name in ("noise_multiplier", "sample_rate", "expected_batch_size"):
        yield _equal(f"plan: {name}", getattr(record, name), getattr(plan, name), CONFIG)
    if record.plan is not None:
        close = dataclasses.replace(record.plan, noise_multiplier=plan.noise_multiplier, epsilon=plan.epsilon)
        yield _equal("plan: other numbers", close, plan, CONFIG)


def _model(run: Path, record: RunRecord) -> Iterator[Finding]:
    """Compare the hash of the model's file, and its description with the record."""
    if not (run / MODEL).is_file():
        yield Finding(what="model", holds=False, detail=f"{run} holds no {MODEL}. Restore it from a copy")
    elif record.model_sha256 is not None:
        yield _equal("model: SHA-256", record.model_sha256, sha256(run / MODEL), MODEL)
    if (run / DESCRIPTION).is_file():
        try:
            yield _equal("model: name", record.model, ModelDescription.read(run / DESCRIPTION).model, DESCRIPTION)
        except DPQuantError as error:
            yield Finding(what="model: name", holds=False, detail=str(error))


def _epochs(run: Path, record: RunRecord) -> Iterator[Finding]:
    """Compare the epochs of the record with one another, with its totals and with metrics.jsonl."""
    yield _equal(
        "epochs: last test accuracy", record.accuracy_test, record.per_epoch[-1].accuracy_test, "its last epoch"
    )
    count = len(record.per_epoch)  # a crash can lose the end of an epoch that was begun
    yield Finding(what="epochs: number", holds=count <= record.epochs, detail=f"{count} recorded of {record.epochs}")
    chosen = [one.layers_quantized for one in record.per_epoch if one.layers_quantized is not None]
    if chosen and len(chosen) == record.epochs:
        times = {layer.name: sum(layer.name in names for names in chosen) for layer in record.layers}
        yield _equal(
            "epochs: times quantized",
            {one.name: one.times_quantized for one in record.layers},
            times,
            "its list of epochs",
        )
        share = sum(len(names) / max(len(record.layers), 1) for names in chosen) / len(chosen)
        yield _equal("epochs: quantized layers", record.quantized_fraction_layers, share, "its list of epochs")
    spent = [one.epsilon for one in record.per_epoch if one.epsilon is not None]
    if spent:
        growing = spent == sorted(spent) and spent[-1] <= record.epsilon * (1 + _ROUND_OFF)
        yield Finding(what="epochs: epsilon grows to the total", holds=growing, detail=_shown(spent[-1]))
    if (run / METRICS).is_file() and record.provenance is not None:
        lines = (run / METRICS).read_text(errors="replace", encoding="utf-8").splitlines()
        same = any(lines == [metrics_line(one, scores=has) for one in record.per_epoch] for has in (True, False))
        detail = f"{len(lines)} lines, as in {RECORD}" if same else f"other lines than {RECORD} has epochs"
        yield Finding(what="epochs: metrics", holds=same, detail=detail)


def _evaluation(run: Path, record: RunRecord) -> Iterator[Finding]:
    """What was measured on test records, if anything was, is of this model."""
    if not (run / EVALUATION).is_file():
        return
    try:
        found = Evaluation.read(run / EVALUATION).model_sha256
        yield _equal("evaluation: of this model", record.model_sha256 or found, found, EVALUATION)
        spent = releases.read(run / RELEASES)
    except DPQuantError as error:
        yield Finding(what="evaluation", holds=False, detail=str(error))
        return
    if spent:
        detail = f"{len(spent)} releases, epsilon {rounded_up(releases.together(spent))} for the test records"
        yield Finding(what="evaluation: releases of test records", holds=True, detail=detail)


def _report(run: Path) -> Iterator[Finding]:
    """The report, if there is one, was made of this record."""
    if not (run / REPORT).is_file():
        return
    digest = hashlib.sha256((run / RECORD).read_bytes()).hexdigest()
    holds = digest in (run / REPORT).read_text(errors="replace", encoding="utf-8")
    detail = f"made of this {RECORD}" if holds else f"made of another {RECORD}. Make it again: dpquant report {run}"
    yield Finding(what="report", holds=holds, detail=detail)
