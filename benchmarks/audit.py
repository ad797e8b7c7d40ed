# SPDX-License-Identifier: Apache-2.0
"""Audit of dpquant itself, with fresh keys: all that takes too long for the tests. About ten minutes on one core.

    scripts/audit [--quick]

Taps and games with many draws, honest and with planted faults; then trainings of digits with canaries at epsilon 1, 2
and 8, in full precision and quantized, and one without noise, which must be refuted. Ends with a summary of what was
tried. Writes benchmarks/results/<cpu>-<date>/audit.json. Exit code 1: an honest run was refuted, or a fault was not.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dpquant
from benchmarks.results import folder_here
from dpquant.audits.games import Worlds, tap_game, world_game
from dpquant.audits.one_run import Attacker, judged, one_run
from dpquant.audits.report import LEVEL
from dpquant.audits.taps import Start, Tapping, moments, tapped
from dpquant.formats import precision
from dpquant.machine import Hardware
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sources import form_of
from dpquant.training.execution import ExecutionRequest
from dpquant.training.private import PrivateTraining
from dpquant.training.start import Request, begin, make_private

FORMATS = (None, "luq-fp4", "int8")
EPSILONS = (1.0, 2.0, 8.0)
TRAINING: dict[str, Any] = {"model": "mlp", "epochs": 60, "lr": 0.5, "threads": 1}
SCHEDULES = {
    True: {"policy": "dpquant", "fraction": 0.75, "format": "luq-fp4"},
    False: {"policy": "none"},
}  # quantized or not
CANARIES = 300
SURELY = 0.999  # power with which a fault has to be found


@dataclasses.dataclass
class Louder:
    """Noise of another standard deviation than it is asked for; for a factor of 0 there is none. NOT PRIVATE."""

    inner: Any
    factor: float

    @property
    def secure(self) -> bool:
        return False

    def gaussian(self, shape: Any, std: float, **purpose: Any) -> torch.Tensor:
        return self.inner.gaussian(shape, std, **purpose) * self.factor


class ClipsAt(PrivateTraining):
    """Contributions of a multiple of C, which pass for C. NOT PRIVATE."""

    factor = 1.0

    def _clipped_sum(self, pieces: Any, key: int) -> Any:
        clipped = super()._clipped_sum(pieces, key)
        for grad in clipped.grads.values():
            grad.mul_(self.factor)
        return clipped

    def _impact_sum(self, pieces: Any, names: Any, keys: Any) -> Any:
        measured = super()._impact_sum(pieces, names, keys)
        measured.impacts.mul_(self.factor)
        return measured


class ClipsAtTwo(ClipsAt):
    factor = 2.0


def with_fault(*, noise: float = 1.0, make_run: type[PrivateTraining] = PrivateTraining) -> Start:
    """Return what starts runs with a fault, with fresh keys."""

    def start(model: Any, optimizer: Any, records: Any, **given: Any) -> PrivateTraining:
        execution = ExecutionRequest(
            chosen=precision(given.get("format", "luq-fp4")),
            rest=precision(given.get("rest", "full")),
            backend=given.get("backend", "auto"),
            microbatch_size=given.get("microbatch_size"),
            memory=given.get("memory"),
        )
        kept = ("loss_fn", "plan", "policy", "seed", "example", "choices")
        facts = {name: given[name] for name in kept if name in given}
        request = Request(model=model, optimizer=optimizer, train_set=records, execution=execution, **facts)

        def mechanism(step_seconds: float) -> Mechanism:
            honest = Mechanism.secret(Ledger(given.get("ledger"), research=True))
            return dataclasses.replace(honest, noise=Louder(honest.noise, noise))

        return begin(request, mechanism, make_run=make_run)

    return start


FAULTS: dict[str, Start] = {
    "honest": make_private,
    "noise halved": with_fault(noise=0.5),
    "noise a quarter less": with_fault(noise=0.75),
    "clipped at 2 C": with_fault(make_run=ClipsAtTwo),
}


@dataclasses.dataclass
class Trials:
    """What was tried so far."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, trial: str, fault: str, draws: int, found: Any, must: bool | None) -> None:
        """Add a result. `must`: whether it must refute; None: it may or may not."""
        lowest = min(found.p_values())
        refuted = lowest < LEVEL
        wrong = must is not None and refuted != must
        row = {"trial": trial, "fault": fault, "draws": draws, "refuted": refuted, "wrong": wrong, "p_value": lowest}
        self.rows.append({**row, "found": dataclasses.asdict(found)})
        print(f"{trial:48} {fault:22} p = {lowest:8.2g} {'REFUTED' if refuted else ''} {'WRONG' if wrong else ''}")
        sys.stdout.flush()


def seed() -> int:
    """Return a fresh seed of coins and networks."""
    return int.from_bytes(os.urandom(7), "big")


def plan(**changes: Any) -> PrivacyPlan:
    facts = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.1, "steps": 60}
    return PrivacyPlan(**{**facts, "expected_batch_size": 200.0, **changes})


def taps(trials: Trials, canaries: int) -> None:
    for format in FORMATS:
        for fault, start in FAULTS.items():
            found = moments(tapped(Tapping(plan(), canaries, format, seed()), start=start), format=format, alpha=LEVEL)
            trials.add(f"taps, {format or 'full precision'}", fault, canaries * found.steps, found, fault != "honest")


def games(trials: Trials, canaries: int, plays: int) -> None:
    for format in FORMATS:
        for fault, start in FAULTS.items():
            tapping = Tapping(plan(sample_rate=1.0, steps=20), canaries, format, seed())
            found = tap_game(tapped(tapping, start=start), alpha=LEVEL)
            trials.add(f"game, taps, {format or 'full precision'}", fault, 2 * found.plays, found, fault != "honest")
    for format in ("luq-fp4", "int8"):
        for fault, start in FAULTS.items():
            for found in world_game(Worlds(plays, format=format, seed=seed()), alpha=LEVEL, start=start):
                surely = fault != "noise a quarter less" and found.power["noise halved"] > SURELY
                must = False if fault == "honest" else True if surely else None
                trials.add(f"game, {found.release}, {format}", fault, 2 * found.plays, found, must)


def trainings(trials: Trials, canaries: int, work: Path) -> None:
    for quantized in (False, True):
        kind = "quantized" if quantized else "full precision"
        for epsilon in EPSILONS:
            found = one_run(
                settings(epsilon, quantized),
                work / f"{kind}-{epsilon}",
                attacker=attacker_of(settings(epsilon, quantized), canaries),
                alpha=LEVEL,
            )
            trials.add(f"training, {kind}, epsilon {epsilon:g}", "honest", canaries, found, False)
        silent = settings(1.0, quantized)
        attacker = attacker_of(silent, canaries, with_fault(noise=0.0))
        found = one_run(silent, work / f"{kind}-silent", attacker=attacker, alpha=LEVEL)
        for epsilon in EPSILONS:  # without noise all claims are of the same training
            against = judged(found.guesses, claimed(epsilon, quantized), found.delta, found.accuracy_test, LEVEL)
            trials.add(
                f"training, {kind}, epsilon {epsilon:g}", "no noise", canaries, against, True if epsilon <= 1 else None
            )


def attacker_of(settings: TrainSettings, canaries: int, start: Start = make_private) -> Attacker:
    return Attacker(form_of(settings), canaries, seed(), start)


def settings(epsilon: float, quantized: bool) -> TrainSettings:
    return TrainSettings.chosen({**TRAINING, **SCHEDULES[quantized], "epsilon": epsilon})


def claimed(epsilon: float, quantized: bool) -> list[Event]:
    return list(plan_of(settings(epsilon, quantized)).budget().events)


def timed(name: str, made: Callable[[], None], seconds: dict[str, float]) -> None:
    began = time.perf_counter()
    made()
    seconds[name] = round(time.perf_counter() - began, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws, no trainings; writes nothing")
    quick = parser.parse_args().quick
    trials, seconds = Trials(), {}
    canaries, plays = (500, 20) if quick else (2000, 300)
    timed("taps", lambda: taps(trials, canaries), seconds)
    timed("games", lambda: games(trials, canaries, plays), seconds)
    if not quick:
        with tempfile.TemporaryDirectory() as work:
            timed("trainings", lambda: trainings(trials, CANARIES, Path(work)), seconds)
    wrong = [row for row in trials.rows if row["wrong"]]
    honest = [row for row in trials.rows if row["fault"] == "honest"]
    faults = [row for row in trials.rows if row["fault"] != "honest"]
    draws = {"sums, plays and guesses": sum(row["draws"] for row in trials.rows)}
    summary = {
        "honest trials": len(honest),
        "honest trials refuted": sum(row["refuted"] for row in honest),
        "planted faults": len(faults),
        "planted faults refuted": sum(row["refuted"] for row in faults),
        "wrong": len(wrong),
        **draws,
    }
    print(json.dumps({**summary, "seconds": seconds}, indent=1))
    if not quick:
        facts = {"dpquant": dpquant.__version__, "hardware": dataclasses.asdict(Hardware.here()), "level": LEVEL}
        whole = {**facts, "summary": summary, "seconds": seconds, "trials": trials.rows}
        (folder_here() / "audit.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
