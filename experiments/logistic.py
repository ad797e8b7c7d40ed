# SPDX-License-Identifier: Apache-2.0
"""Logistic regressions by scikit-learn on the records of `tables`, `text` and `transfer`. NOT PRIVATE.

They say what the same features give without privacy: of Census-Income one-hot categories, of texts and images the
features of public networks.
"""

import json
import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse

from dpquant.data.dataset import Dataset
from dpquant.data.held import Held
from dpquant.runs.evaluation import rare_metrics
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from experiments.features import FEATURES
from experiments.runner import Site

NEEDS = ("CENSUS", *FEATURES)
STRENGTHS = {"CENSUS": 1.0}  # inverse of the penalty; features of norm 1 get another one
_FEATURES_STRENGTH = 100.0


def run(site: Site) -> None:
    """Write results/logistic.json: {data: metrics in percent}, of what is there."""
    path = site.results / "logistic.json"
    found = json.loads(path.read_text())["not_private"] if path.exists() else {}
    for name in NEEDS:
        if name in site.folders and name not in found:
            dataset = dataset_of(TrainSettings.chosen({"data": f"packed:{site.folders[name]}"}))
            found[name] = metrics_of(dataset, STRENGTHS.get(name, _FEATURES_STRENGTH))
            print(f"logistic regression, not private, {name}: {found[name]}", flush=True)
    if found:
        path.write_text(
            json.dumps({"title": "NOT PRIVATE: logistic regressions", "not_private": found}, indent=1) + "\n"
        )


def metrics_of(dataset: Dataset, strength: float) -> dict[str, float]:
    """Fit a logistic regression to the training records; return its metrics on the test records, in percent."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that more iterations would help
        fitted.fit(*_one_hot(dataset, dataset.train))
    inputs, targets = _one_hot(dataset, dataset.test)
    found = {"accuracy": float(np.mean(fitted.predict(inputs) == targets))}
    if dataset.task.kind == "rare positives":
        found |= rare_metrics(fitted.decision_function(inputs), targets == 1)
    return {name: round(100 * value, 2) for name, value in found.items()}


def _one_hot(dataset: Dataset, split: Held) -> tuple[Any, np.ndarray]:
    """Return inputs, with an indicator for each value of each category, and targets."""
    inputs, targets = (part.numpy() for part in split.batch(torch.arange(len(split))))
    if not dataset.categories:
        return inputs, targets
    numbers = inputs.shape[1] - len(dataset.categories)
    codes = inputs[:, numbers:].astype(np.int64)
    starts = np.cumsum([0, *dataset.categories])
    columns = (codes + starts[:-1]).ravel()
    pointers = np.arange(0, columns.size + 1, codes.shape[1])
    indicators = sparse.csr_matrix((np.ones(columns.size), columns, pointers), shape=(len(inputs), starts[-1]))
    return sparse.hstack([sparse.csr_matrix(inputs[:, :numbers]), indicators], format="csr"), targets
