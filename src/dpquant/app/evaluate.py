# SPDX-License-Identifier: Apache-2.0
"""`dpquant evaluate`: measures a run's model on test records, without protection, or releases one number with noise.

Without `--test-epsilon` everything is computed from the test records, which no epsilon protects. With it, the number of
records that the model tells correctly is released with noise, and nothing else: the release is written to
`test-releases.jsonl` before the records are used, no error depends on a single record, and the number of records is the
caller's public one.
"""

from pathlib import Path

from dpquant.app.export import unplaced
from dpquant.app.report import renew_report
from dpquant.errors import SettingError
from dpquant.privacy import releases
from dpquant.privacy.noisy_count import check_count_epsilon, noise_bound, noisy_count
from dpquant.privacy.plan import rounded_up
from dpquant.privacy.releases import Release
from dpquant.privacy.secret import SecretKey
from dpquant.runs.describing import task_of
from dpquant.runs.evaluated import UNPROTECTED, Evaluation, Protected
from dpquant.runs.held_out import held_out, source_of
from dpquant.runs.loading import check_ended, described, load
from dpquant.runs.measures import count_right, measured
from dpquant.runs.names import EVALUATION, MODEL, RELEASES
from dpquant.runs.place import Place
from dpquant.runs.record import sha256

_COVERED = 0.95  # of the noise, by the interval that is stated
_OPEN = (
    f"{UNPROTECTED}: no epsilon holds for the people whose records are test records. Publish these numbers only if "
    "they may be published. Records that cannot be used count as wrong."
)


def evaluate(run: Path, data: str | None = None) -> Evaluation:
    """Measure a run's model on test records, and write evaluation.json and, if there is one, the report again.

    Args:
      run: directory of a run that has ended.
      data: the test records, as `held_out` takes them; None: the run's own.
    Raises:
      SettingError: there is no run that has ended, or a file cannot be written.
      DataError, ModelError: the model or the records cannot be read, or do not fit.
    Privacy: no mechanism; the test records are not protected.
    """
    check_ended(run)
    settings = Place(run).settings()
    model, description = load(run), described(run)
    split = held_out(run, settings, description, data, strict=True)
    found = Evaluation(
        data=unplaced(source_of(settings, data)) or "",
        task=description.task.kind,
        model_sha256=sha256(run / MODEL),
        statement=_OPEN,
        **measured(model, split, task_of(description), description.class_names),
    )
    _write(run, found)
    return found


def release_accuracy(
    run: Path, data: str | None, *, epsilon: float, records: int | None, key: SecretKey | None = None
) -> Evaluation:
    """Release a model's accuracy on test records that are private, too, and write evaluation.json.

    Args:
      run: as for `evaluate`.
      data: as for `evaluate`.
      epsilon: of this release, for the test records.
      records: public number of test records, which need not be the true one.
      key: of the noise; None makes one. Research only: whoever knows it can undo the noise.
    Raises:
      SettingError: epsilon is out of range, records is not given, the task has no accuracy, or as for `evaluate`.
      DataError, ModelError: as for `evaluate`.
      LedgerError: the release cannot be written down. Nothing was computed then.
    Privacy: epsilon-differentially private under adding or removing one test record; charged to test-releases.jsonl
      before a record passes the model.
    """
    check_ended(run)
    check_count_epsilon("test_epsilon", epsilon)
    if records is None:
        raise SettingError(
            "Expected test_records with test_epsilon; got none. The exact number of private test records is itself "
            "private, and the noisy count is divided by a public number. Give --test-records, which may be approximate."
        )
    if records < 1:
        raise SettingError(f"Expected test_records >= 1; got test_records={records}. The count is divided by it.")
    settings = Place(run).settings()
    model, description = load(run), described(run)
    if description.task.kind == "regression":
        raise SettingError(
            "Expected a classification with test_epsilon; got a regression. Errors of numbers have no count to "
            "release. Evaluate on test records that need no protection."
        )
    split = held_out(run, settings, description, data, strict=False)
    past = releases.charge(run / RELEASES, Release(what="accuracy", epsilon=epsilon, records=records))
    count = noisy_count(count_right(model, split, task_of(description)), epsilon, key or SecretKey())
    protected = Protected(
        accuracy=min(max(count, 0), records) / records,
        epsilon=epsilon,
        records=records,
        half_width=noise_bound(epsilon, _COVERED) / records,
        releases=len(past),
        epsilon_together=releases.together(past),
    )
    found = Evaluation(
        data=unplaced(source_of(settings, data)) or "",
        task=description.task.kind,
        model_sha256=sha256(run / MODEL),
        statement=_statement(protected, own=data is None or data == settings.data, secure=key is None or key.secure),
        protected=protected,
    )
    _write(run, found)
    return found


def _statement(found: Protected, *, own: bool, secure: bool) -> str:
    """Return what is promised to the people whose records are test records."""
    several = ""
    if found.releases > 1:
        several = (
            f"It is release {found.releases} that {RELEASES} holds; all of them together have epsilon = "
            f"{rounded_up(found.epsilon_together)} for whoever is in all of their test records.\n"
        )
    before = "" if secure else "NOT PRIVATE: the noise came from a given seed. Whoever knows it can undo it.\n"
    if own:
        before += (
            "NOT PROTECTED BEFORE: these are the run's own test records, whose accuracy its record states after every "
            "epoch, without noise. This release adds no protection to that.\n"
        )
    return (
        f"{before}The accuracy has epsilon = {rounded_up(found.epsilon)}, delta = 0 for each test record, under adding "
        "or removing one: the number of records that the model tells correctly, plus an integer with probability "
        f"proportional to exp(-{found.epsilon:g} |x|), drawn exactly from a key of the operating system, over "
        f"{found.records:,}, a public number.\n{several}"
        "This is a promise to other people than the training records', and another epsilon. Whoever has a record among "
        "both adds both up.\n"
        "Nothing else was computed from the test records. Not covered: what was measured on them without "
        "--test-epsilon, also by other runs; releases of other runs on the same people; several records of one person; "
        "how long the measurement took."
    )


def _write(run: Path, found: Evaluation) -> None:
    """Write evaluation.json, and the report again if there is one.

    Raises:
      SettingError: a file cannot be written.
    """
    try:
        found.write(run / EVALUATION)
    except OSError as error:
        raise SettingError(
            f"Expected {run} to be a place that can be written to; got {error.strerror or error}. The evaluation was "
            "not written. Make room, or copy the run."
        ) from error
    renew_report(run)
