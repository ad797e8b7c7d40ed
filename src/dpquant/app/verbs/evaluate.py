# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpquant.app.evaluation_tables import print_evaluation
from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError, SettingError


def evaluate(
    run: Annotated[Path, typer.Argument(help="directory of a run that has ended")],
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
        print_evaluation(Console(), found)
    return 0
