# SPDX-License-Identifier: Apache-2.0
"""The server: Flower's FedAvg, weighted by public numbers of records, tested on public records after each round."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from study import STUDY, network, public_test_set

RESULT = "DPQUANT_RESULT"  # environment variable: file for the course of the study

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, and write accuracy and the largest epsilon after each."""
    result = strategy().start(
        grid=grid,
        initial_arrays=ArrayRecord(network().state_dict()),
        num_rounds=STUDY.rounds,
        evaluate_fn=accuracy,
    )
    course = [
        {
            "round": number,
            "accuracy_test": result.evaluate_metrics_serverapp[number]["accuracy"],
            "largest_epsilon": result.train_metrics_clientapp[number]["epsilon"],
            "fewest_steps": result.train_metrics_clientapp[number]["steps"],
        }
        for number in range(1, STUDY.rounds + 1)
    ]
    Path(os.environ.get(RESULT, "runs/federated/course.json")).write_text(json.dumps(course, indent=2) + "\n")


def strategy() -> FedAvg:
    """Return Flower's own averaging. Silos do not evaluate: what they measured on their records would be private."""
    return FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=largest)


def largest(replies: Iterable[RecordDict], weighted_by: str) -> MetricRecord:
    """Return the largest epsilon and the fewest steps of any silo; a mean would be the promise of none."""
    told = [reply["metrics"] for reply in replies]
    return MetricRecord({"epsilon": max(one["epsilon"] for one in told), "steps": min(one["steps"] for one in told)})


def accuracy(number: int, arrays: ArrayRecord) -> MetricRecord:
    """Return the accuracy of a round's average on public records."""
    model, (images, labels) = network(), public_test_set()
    model.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        right = (model(images).argmax(dim=1) == labels).float().mean()
    return MetricRecord({"accuracy": float(right)})
