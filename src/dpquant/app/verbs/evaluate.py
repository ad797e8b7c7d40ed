# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.completion import run_directories
from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.app.output import results
from dpquant.errors import LedgerError, SettingError

if TYPE_CHECKING:
    from dpquant.runs.evaluated import Evaluation

_MOST_COLUMNS = 10  # of a confusion matrix that is printed; the report and --json have larger ones


def evaluate(
    run: Annotated[Path, typer.Argument(autocompletion=run_directories, help="directory of a run that has ended")],
    data: Annotated[
        str | None,
        typer.Option(
            help="test records [the run's own]: image-folder:PATH, table:FILE, text:FILE, packed:PATH or a data set"
        ),
    ] = None,
    test_epsilon: Annotated[
        float | None,
        typer.Option(help="of test records that are private, too: release their accuracy alone, with noise"),
    ] = None,
    test_records: Annotated[
        int | None, typer.Option(help="with test-epsilon: public, if need be approximate, number of test records")
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure a run's model on test records, class by class, and write RUN/evaluation.json.

    Accuracy with a 95 % interval, precision and recall of each class and the confusion matrix; of two classes also
    average precision, ROC AUC, recall at 1 % false positives, and calibration; of numbers their errors. The report in
    RUN is made again with them. Nothing of this is protected by an epsilon: test records are not training records.

    With --test-epsilon E, for test records that are private, too, one number is released: the accuracy, with noise, at
    epsilon E for each test record. It is written to RUN/test-releases.jsonl first, and asking again adds up.

    Exit code 1: that file is not as it was written.

    With --json: the content of evaluation.json: data, task, model_sha256, statement, and, each null where it does not
    fit, records, unreadable, accuracy, accuracy_low, accuracy_high, classes, confusion, ranking, errors and protected.

    Example: dpquant evaluate runs/fashion --data image-folder:new-photos
    """
    from dpquant.app.evaluate import evaluate as evaluated
    from dpquant.app.evaluate import release_accuracy

    if test_records is not None and test_epsilon is None:
        raise SettingError(
            f"Expected no test_records without test_epsilon; got test_records={test_records}. It would be ignored. "
            "Give --test-epsilon, or leave it out."
        )
    try:
        if test_epsilon is None:
            found = evaluated(run, data)
        else:
            found = release_accuracy(run, data, epsilon=test_epsilon, records=test_records)
    except LedgerError as error:
        return refuse(str(error), WRONG_RESULT)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_evaluation(results(), found)
    return 0


def print_evaluation(console: Console, found: "Evaluation") -> None:
    """Print what was measured, and whether and how the test records are protected."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    if found.classes is not None:
        console.print()
        console.print(_classes(found), highlight=False)
    if found.confusion is not None and len(found.confusion) <= _MOST_COLUMNS:
        console.print("\nConfusion: a row for each true class, a column for what it was taken for", highlight=False)
        console.print(_confusion(found), highlight=False)
    console.print(f"\n{found.statement}", markup=False, highlight=False)


def _facts(found: "Evaluation") -> list[tuple[str, str]]:
    rows = [("test records", found.data)]
    if found.records is not None:
        unreadable = f", {found.unreadable:,} of them unreadable" if found.unreadable else ""
        rows.append(("number", f"{found.records:,}{unreadable}"))
    if found.accuracy is not None and found.accuracy_low is not None and found.accuracy_high is not None:
        interval = f"{found.accuracy_low:.2%} to {found.accuracy_high:.2%}"
        rows.append(("accuracy", f"{found.accuracy:.2%} (95 % interval {interval})"))
    if (noisy := found.protected) is not None:
        rows.append(("accuracy, with noise", f"{noisy.accuracy:.2%} (95 % of the noise within {noisy.half_width:.2%})"))
    if (ranking := found.ranking) is not None:
        named = {
            "average precision": ranking.average_precision,
            "ROC AUC": ranking.roc_auc,
            "recall at 1 % false positives": ranking.recall_at_1_percent_fpr,
            "calibration error": ranking.calibration_error,
        }
        rows += [
            (name, "- (records of one class)" if value is None else f"{value:.4f}") for name, value in named.items()
        ]
    rows += [(name.replace("_", " "), f"{value:.4g}") for name, value in (found.errors or {}).items()]
    return rows


def _classes(found: "Evaluation") -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("class", "precision", "recall", "records")):
        table.add_column(title, justify="right" if number else "left")
    for one in found.classes or ():
        table.add_row(_plain(one.name), _share(one.precision), _share(one.recall), f"{one.support:,}")
    return table


def _confusion(found: "Evaluation") -> Table:
    table = Table(box=None, pad_edge=False)
    names = [_plain(one.name) for one in found.classes or ()]
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, found.confusion or (), strict=True):
        table.add_row(name, *(f"{count}" for count in row))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _plain(name: str) -> str:
    """Return a class's name as rich shows it, without taking brackets in it for markup."""
    return name.replace("[", "\\[")
