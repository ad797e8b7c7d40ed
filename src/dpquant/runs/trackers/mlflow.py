# SPDX-License-Identifier: Apache-2.0
"""MLflow: a run in the store that MLFLOW_TRACKING_URI names, by default a file mlflow.db in the working directory.

Only MLflow's client is used, which names no user, host, program or git commit, as the functions of `import mlflow` do.
Its telemetry is switched off before it is imported. A server that does not answer is asked twice at most, for ten
seconds each, unless the environment says otherwise: the run waits meanwhile.
"""

import dataclasses
import json
import logging
import os
import re

from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.effects import has_effect
from dpquant.runs.names import RECORD
from dpquant.runs.record import EpochRecord, RunRecord, write_whole
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Progress, Sink
from dpquant.runs.trackers.numbers import numbers_of
from dpquant.runs.trackers.tracking import TrackedRun

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for _name, _value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, RunTag  # noqa: E402

_EXPERIMENT = "dpquant"
_ID = "run.json"
_NOT_IN_NAMES = re.compile(r"[^\w./ :-]")  # what MLflow refuses in the name of a metric
_LONGEST = 500  # characters of a parameter in every kind of store


class Tracker(Sink):
    """Keeps settings as parameters, an epoch's numbers at the step that is its number, from 1, and at the end files.

    A process that continues a run continues the run in MLflow, too, whose id is in the tracker's folder.
    """

    def __init__(self, run: TrackedRun):
        """Connect to the store, and make the experiment where it is missing."""
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._run = run
        self._client = MlflowClient()
        self._experiment = self._experiment_of(os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT))
        self._id = self._ended = ""
        self._plan: PrivacyPlan
        self._progress: Progress | None = None

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._plan = plan
        known = self._run.folder / _ID
        if known.exists():
            self._id = json.loads(known.read_text(encoding="utf-8"))["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(self._experiment, start_time=self._milliseconds(), run_name=self._run.name)
        self._id = made.info.run_id
        write_whole(known, json.dumps({"run_id": self._id}) + "\n")
        self._client.log_batch(self._id, params=_params(settings))

    def stepped(self, progress: Progress) -> None:
        self._progress = progress

    def epoch_ended(self, epoch: EpochRecord) -> None:
        found = numbers_of(epoch, self._progress, self._plan)
        now, step = self._milliseconds(), epoch.index + 1
        metrics = [Metric(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in found.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finished(self, record: RunRecord) -> None:
        self._client.log_batch(self._id, tags=[RunTag("dpquant.statement", record.statement)])
        self._client.log_text(self._id, record.to_json(), RECORD)
        for path in self._run.files(record):
            self._client.log_artifact(self._id, str(path))
        self._ended = "FINISHED"

    def close(self) -> None:
        """Say in MLflow that the process has come to an end, and whether the run has."""
        if self._id:
            self._client.set_terminated(self._id, self._ended or "KILLED", end_time=self._milliseconds())

    def _experiment_of(self, name: str) -> str:
        """Return the id of the experiment of this name, which is made if it is missing."""
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def _milliseconds(self) -> int:
        return int(1000 * self._run.now())


def _params(settings: TrainSettings) -> list[Param]:
    """Return all settings that have an effect and a value."""
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    used = {name: value for name, value in found.items() if value is not None and has_effect(name, found)}
    return [Param(name, str(value)[:_LONGEST]) for name, value in used.items()]
