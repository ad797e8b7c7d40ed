# SPDX-License-Identifier: Apache-2.0
"""The audit of a run: which trials are made of its settings, and whether any of them refutes its claim."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpquant.audits.games import GameFound, Worlds, tap_game, world_game
from dpquant.audits.one_run import Attacker, OneRunFound, check_count, check_in_memory, one_run
from dpquant.audits.taps import Start, TapFound, Tapping, moments, tapped
from dpquant.errors import SettingError
from dpquant.formats import format_tried
from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.names import CHOICES
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import Sink
from dpquant.runs.sources import form_of
from dpquant.training.start import make_private

MODES = ("all", "tap", "game", "one-run")
FALSE_ALARM = 1e-4  # chance, at most, that an audit refutes an honest run
LEVEL = FALSE_ALARM / 10  # of a single test; an audit makes at most ten
CANARIES = 1000

_TAP_STEPS, _GAME_STEPS = 100, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Result of an audit.

    Attributes:
      run: directory of the run.
      mode: trials that were made.
      epsilon, delta: the run's claim, as planned; epsilon is null if it is infinite.
      false_alarm: chance, at most, that an honest run is refuted.
      refuted: whether a trial refutes the claim.
      taps, games: results of these trials.
      one_run: result of the training with canaries; None if it was not made.
      copy: directory of that training, which must not be released; None.
    """

    run: str
    mode: str
    epsilon: float
    delta: float
    false_alarm: float
    taps: list[TapFound]
    games: list[GameFound]
    one_run: OneRunFound | None
    copy: str | None

    @property
    def refuted(self) -> bool:
        found = [*self.taps, *self.games, *([] if self.one_run is None else [self.one_run])]
        return any(p < LEVEL for one in found for p in one.p_values())

    def to_json(self) -> str:
        """Return the audit as JSON."""
        return json.dumps({**dataclasses.asdict(self), "refuted": self.refuted}, indent=2) + "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """Which trials are made.

    Attributes:
      mode: `all`, or one of `tap`, `game` and `one-run`.
      canaries: in the training copy; None: 1000, or as many as there are records.
      seed: of coins, canaries and small networks.
      taps: tap canaries.
      plays: of a game about one record, in each world.
    Raises:
      SettingError: the mode is unknown, or the seed is out of range.
    """

    mode: str = "all"
    canaries: int | None = None
    seed: int = 0
    taps: int = 2000
    plays: int = 200

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(
                f"Expected mode to be one of {', '.join(MODES)}; got mode={self.mode}. See dpquant audit --help."
            )
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"Expected seed in 0 .. 2^63 - 1; got seed={self.seed}. See dpquant audit --help.")


def audit(
    run: Path,
    request: AuditRequest,
    *,
    out: Path,
    command: str = "",
    sinks: Sequence[Sink] = (),
    start: Start = make_private,
    watch: Callable[[str], None] = lambda what: None,
) -> Audit:
    """Try to refute the epsilon of a run, with its own settings, on the real code.

    Args:
      run: directory of the run.
      request: which trials, and with what.
      out: directory of the training copy, which must be missing or empty; not made for `tap` and `game`.
      command: the command line, for the copy's record.
      sinks: notified of the copy's progress.
      start: starts a run.
      watch: called with a few words when a trial begins.
    Raises:
      SettingError: the directory holds no run, canaries are out of range, or a training copy's records are packed.
      DPQuantError: as `runs.train.train`.
    Privacy: `tap` and `game` read no private record. `one-run` trains on the private records and charges
      out/ledger.jsonl.
    """
    mode = request.mode
    settings = Place(run).settings()
    plan = plan_of(settings)
    records = plan.expected_batch_size / plan.sample_rate
    canaries = min(CANARIES, round(records)) if request.canaries is None else request.canaries
    check_count(canaries, settings, records)
    if mode in ("all", "one-run"):
        check_in_memory(settings)
        Place(out).check()
    taps, games, found = [], [], None
    if mode in ("all", "tap"):
        taps = _taps(settings, plan, request, start, watch)
    if mode in ("all", "game"):
        games = _games(settings, plan, request, start, watch)
    if mode in ("all", "one-run"):
        watch(f"training a copy with {canaries} canaries in {out}; do not release it")
        found = one_run(
            _copied(settings, run),
            out,
            attacker=Attacker(form_of(settings), canaries, request.seed, start),
            alpha=LEVEL,
            command=command,
            sinks=sinks,
        )
    return Audit(
        run=str(run),
        mode=mode,
        epsilon=plan.epsilon,
        delta=plan.delta,
        false_alarm=FALSE_ALARM,
        taps=taps,
        games=games,
        one_run=found,
        copy=None if found is None else str(out),
    )


def _taps(
    settings: TrainSettings, plan: PrivacyPlan, request: AuditRequest, start: Start, watch: Callable[[str], None]
) -> list[TapFound]:
    found = []
    for format in (None, format_tried(settings.format)):
        watch(f"{request.taps} tap canaries, {format or 'full precision'}")
        tapping = Tapping(_of_steps(plan, min(plan.steps, _TAP_STEPS)), request.taps, format, request.seed)
        found.append(moments(tapped(tapping, start=start), format=format, alpha=LEVEL))
    return found


def _games(
    settings: TrainSettings, plan: PrivacyPlan, request: AuditRequest, start: Start, watch: Callable[[str], None]
) -> list[GameFound]:
    watch("the game of telling whether a record was there, for steps and analyses")
    format = format_tried(settings.format)
    tapping = Tapping(_of_steps(plan, _GAME_STEPS, sample_rate=1.0), request.taps, format, request.seed)
    worlds = Worlds(
        request.plays,
        score="gradient" if plan.analysis is None else plan.analysis.score,
        format=format,
        seed=request.seed,
    )
    return [tap_game(tapped(tapping, start=start), alpha=LEVEL), *world_game(worlds, alpha=LEVEL, start=start)]


def _of_steps(plan: PrivacyPlan, steps: int, **changes: Any) -> PrivacyPlan:
    """Return the plan with another number of steps, without analyses."""
    facts = {
        "noise_multiplier": plan.noise_multiplier,
        "delta": plan.delta,
        "max_grad_norm": plan.max_grad_norm,
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
    }
    return PrivacyPlan(**{**facts, **changes}, steps=steps)


def _copied(settings: TrainSettings, run: Path) -> TrainSettings:
    """Return the settings of the copy: those of the run, with its decisions, and without what is not private."""
    choices = run / CHOICES
    return dataclasses.replace(
        settings, unsafe_metrics=False, choices=str(choices) if choices.exists() else settings.choices
    )
