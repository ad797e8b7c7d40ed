# SPDX-License-Identifier: Apache-2.0
"""`dpquant compare`: trains privately under several policies and seeds, each run on a budget of its own.

Each run is one of `dpquant train`, in its own directory. A finished run is read, not repeated; an interrupted run is
moved aside and repeated. Means over seeds have confidence intervals by Student's t. The runs train on the same records,
so their privacy losses add up: the epsilon of all runs together is reported next to the epsilon of one run. It composes
every ledger in the directory, including those of interrupted runs.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from scipy import stats

from dpquant.app.spent import charged_by
from dpquant.errors import SettingError, did_you_mean
from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.named import check_accuracy
from dpquant.runs.names import CONFIG, LEDGER, RECORD, TIMINGS
from dpquant.runs.pages.curves import curves
from dpquant.runs.ranges import POLICIES
from dpquant.runs.record import RunRecord, write_whole
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import Sink
from dpquant.runs.timings import Timings
from dpquant.runs.trackers.registry import check_trackers
from dpquant.runs.train import train

CONFIDENCE = 0.95
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Results of one policy over all seeds.

    Attributes:
      accuracies: test accuracy of each seed's run, in 0..1.
      mean: mean of the accuracies.
      half_width: half the width of the mean's confidence interval; None for a single seed.
      epsilon: largest epsilon of a single run.
      quantized_fraction_macs, four_bit_fraction_macs: as in `RunRecord`, means over seeds.
      seconds: time of training and analyses, mean over seeds; None if the timings of a run are missing. For the
        operator only, not for release.
    """

    accuracies: tuple[float, ...]
    mean: float
    half_width: float | None
    epsilon: float
    quantized_fraction_macs: float
    four_bit_fraction_macs: float
    seconds: float | None

    @classmethod
    def of(cls, records: Sequence[RunRecord], timings: Sequence[Timings | None]) -> "Row":
        """Return the row of one policy from the records and timings of its runs, one per seed."""
        seconds = [found.seconds_train + found.seconds_analysis for found in timings if found is not None]
        accuracies = tuple(record.accuracy_test for record in records if record.accuracy_test is not None)
        return cls(
            accuracies=accuracies,
            mean=statistics.mean(accuracies),
            half_width=half_width(accuracies),
            epsilon=max(record.epsilon for record in records),
            quantized_fraction_macs=statistics.mean(record.quantized_fraction_macs for record in records),
            four_bit_fraction_macs=statistics.mean(record.four_bit_fraction_macs for record in records),
            seconds=statistics.mean(seconds) if len(seconds) == len(timings) else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `compare`.

    Attributes:
      settings: of all runs, except for policy and seed.
      rows: {policy: its results}.
      epsilon_together: epsilon at `delta` of everything that was charged in the directory.
      delta: of the settings.
    """

    settings: TrainSettings
    rows: Mapping[str, Row]
    epsilon_together: float
    delta: float

    def to_json(self) -> str:
        """Return the comparison as JSON, without the seconds of the rows, which are not for release."""
        fields = dataclasses.asdict(self)
        for row in fields["rows"].values():
            del row["seconds"]
        return json.dumps(fields, indent=2) + "\n"


def compare(
    settings: TrainSettings,
    policies: Sequence[str],
    num_seeds: int,
    out: Path,
    *,
    watch: Callable[[str], None] = lambda what: None,
    train: Callable[..., object] = train,
) -> Comparison:
    """Train under every policy at seeds 0 .. num_seeds - 1; write out/compare.json and out/compare.svg.

    Args:
      settings: of all runs; policy and seed are replaced.
      policies: names, as for `train`.
      num_seeds: number of runs of each policy, >= 1.
      out: directory. Finished runs in it are read, not repeated. Only one comparison at a time may use it.
      watch: called with a few words about each run when it begins.
      train: performs a run, with the arguments of `runs.train.train`.
    Returns: the comparison, as written.
    Raises:
      SettingError: an unknown policy, no seeds, or a directory that holds runs of other settings.
      LedgerError: a ledger in the directory is missing, unreadable or inconsistent.
      DPQuantError: as `train`.
    Privacy: each run charges its own ledger; `epsilon_together` composes all ledgers in `out`.
    """
    if not policies or not 1 <= num_seeds <= _MOST_SEEDS:
        raise SettingError(
            f"Expected at least one policy and seeds in 1 .. {_MOST_SEEDS}; got {len(policies)} policies and "
            f"seeds={num_seeds}. Every seed is a run of each policy. Give both."
        )
    for name in policies:
        if name not in POLICIES:
            raise SettingError(
                f"Expected policies among {', '.join(POLICIES)}; got {name}. {did_you_mean(name, POLICIES)}See dpquant "
                "compare --help."
            )
        if policies.count(name) > 1:
            raise SettingError(
                f"Expected every policy once; got policies={','.join(policies)}. Runs of {name} would be counted "
                "twice. Leave one out, or give more seeds."
            )
    check_accuracy(settings)
    check_trackers(settings.track)
    runs = {
        (policy, seed): dataclasses.replace(settings, policy=policy, seed=seed)
        for seed in range(num_seeds)
        for policy in policies
    }
    plans = {key: plan_of(one) for key, one in runs.items()}
    records: dict[str, list[RunRecord]] = {policy: [] for policy in policies}
    timings: dict[str, list[Timings | None]] = {policy: [] for policy in policies}
    for (policy, seed), one in runs.items():
        folder = out / f"{policy}-{seed}"
        if not (folder / RECORD).exists():
            aside = _moved_aside(folder)
            again = f": repeated, as it was interrupted; what it charged counts, see {aside}" if aside else ""
            says = _Says(watch, f"{policy}, seed {seed}{again}")
            train(one, folder, plan=plans[policy, seed], sinks=[says])
        elif (folder / CONFIG).read_text(encoding="utf-8") != one.to_toml():
            raise SettingError(
                f"Expected out to hold runs of the same settings; got {folder} of others. They cannot be compared. "
                "Name another directory."
            )
        records[policy].append(RunRecord.read(folder / RECORD))
        timings[policy].append(Timings.read(folder / TIMINGS))
    comparison = Comparison(
        settings=settings,
        rows={policy: Row.of(found, timings[policy]) for policy, found in records.items()},
        epsilon_together=accounting.epsilon(charged_in(out, [f"{name}-{seed}" for name, seed in runs]), settings.delta),
        delta=settings.delta,
    )
    write_whole(out / "compare.json", comparison.to_json())
    accuracies = {policy: [run.accuracy_per_epoch for run in runs] for policy, runs in records.items()}
    write_whole(out / "compare.svg", curves(accuracies))
    return comparison


class _Says(Sink):
    """Says a few words when a run begins, after its checks: one that is refused says nothing but its error."""

    def __init__(self, watch: Callable[[str], None], words: str):
        self._watch, self._words = watch, words

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._watch(self._words)


def _moved_aside(folder: Path) -> Path | None:
    """Rename the directory of an interrupted run and return its new path; None if no run was interrupted."""
    if not (folder / LEDGER).exists():
        return None
    places = (folder.with_name(f"{folder.name}.interrupted-{number}") for number in itertools.count(1))
    return folder.rename(next(place for place in places if not place.exists()))


def charged_in(out: Path, finished: Iterable[str]) -> list[Event]:
    """Return all events that were charged by the runs in a directory.

    Args:
      out: directory of run directories. Ledgers of interrupted runs count too.
      finished: names of finished runs, each of which must have a ledger.
    Raises:
      LedgerError: a ledger is missing, unreadable or inconsistent.
    Privacy: post-processing.
    """
    ledgers = {out / name / LEDGER for name in finished} | set(out.glob(f"*/{LEDGER}"))
    return charged_by(sorted(ledgers))


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % confidence interval, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
