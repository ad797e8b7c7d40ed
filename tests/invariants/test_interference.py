# SPDX-License-Identifier: Apache-2.0
"""T12: with the mechanisms' results held fixed, nothing that a run leaves behind may depend on its records.

All private computation runs, but its results are replaced by constants. Times are in timings.json, in progress.json and
on the screen, which are the operator's, and nowhere else.
"""

import dataclasses
import json
import time
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dpquant
from doubles import Told
from dpquant.backends.registry import resolve
from dpquant.data import dataset as data
from dpquant.engine.clip import ClippedSum
from dpquant.formats import precision
from dpquant.privacy.noise import NoiseSource
from dpquant.runs.directory import RunDirectory, append_line
from dpquant.runs.names import DESCRIPTION, METRICS, RECORD
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.private import PrivateTraining
from event_files import events_in
from mechanisms import Silent, starting, with_doubles


def what_the_screen_shows(progress):
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "examples_per_second"}


def what_a_line_says(line):
    """A line of the ledger without the run's random name, from which its hashes follow."""
    return {name: value for name, value in line.items() if name not in ("run", "previous", "hash")}


def what_a_record_says(record):
    """A record without the run's random name, and without when it began, which was before a record was read."""
    ledger, provenance = dict(record["ledger"]), dict(record["provenance"])
    del ledger["head"], provenance["run_id"], provenance["started"]
    return {**record, "ledger": ledger, "provenance": provenance}


def what_a_beat_says(beat):
    """What a heartbeat says less its times, for which it is the operator's."""
    return {name: value for name, value in beat.items() if name in ("running", "step", "steps", "epoch", "epochs")}


def what_was_told(what):
    return what_a_record_says(dataclasses.asdict(what)) if isinstance(what, RunRecord) else what


def what_a_checkpoint_says(path):
    parts = as_lists(Checkpoint.read(path).parts)
    del parts["history"]["started"]
    return parts


def what_tensorboard_says(folder):
    """Every number and text with its step, and with its time since the first."""
    events = [event for path in sorted(folder.iterdir()) for event in events_in(path) if event.HasField("summary")]
    return [
        (one.tag, event.step, one.simple_value, one.tensor.string_val, event.wall_time - events[0].wall_time)
        for event in events
        for one in event.summary.value
    ]


def with_constant_noise(mechanism):
    """The mechanism with noise that is the same in every run."""
    constant = NoiseSource.from_seed(0).gaussian
    return with_doubles(mechanism, gaussian=lambda honest, *a, **k: constant(*a, **k))


def as_lists(value):
    """Nested tensors as nested lists."""
    match value:
        case torch.Tensor():
            return value.tolist()
        case Mapping():
            return {key: as_lists(one) for key, one in value.items()}
        case list() | tuple():
            return [as_lists(one) for one in value]
        case _:
            return value


def left_behind(out, settings, *, make_run=Silent, directory=RunDirectory):
    """Everything that a run leaves behind or says, less what is its operator's."""
    told = Told()
    record = train(
        TrainSettings.chosen(settings),
        out,
        sinks=[told],
        directory=directory,
        start=starting(with_constant_noise, make_run),
    )
    files = {path.name: path for path in out.iterdir()}
    return {
        "files": sorted(files),
        "config": files["config.toml"].read_bytes(),
        "ledger": [what_a_line_says(json.loads(line)) for line in files["ledger.jsonl"].read_text().splitlines()],
        "choices": json.loads(files["choices.json"].read_text()),
        "metrics": [json.loads(line) for line in files["metrics.jsonl"].read_text().splitlines()],
        "record": what_a_record_says(json.loads(files["record.json"].read_text())),
        "heartbeat": what_a_beat_says(json.loads(files["progress.json"].read_text())),
        "description": json.loads(files["model.json"].read_text()),
        "tracker": what_tensorboard_says(out / "trackers" / "tensorboard"),
        "checkpoints": {one.name: what_a_checkpoint_says(one) for one in files["checkpoints"].iterdir()},
        "weights": {name: t.tolist() for name, t in load_file(files["model.safetensors"]).items()},
        "progress": [what_the_screen_shows(progress) for progress in told.of("stepped")],
        "told": [(method, what_was_told(what)) for method, what in told.all if method != "stepped"],
        "statement": record.statement,
    }


RECORDS, OTHERS = 90, 80
SETTINGS = {
    "model": "cnn", "policy": "dpquant",
    "epochs": 2, "batch_size": 20.0, "sample_rate": 0.25, "lr": 0.01, "microbatch_size": 32,
    "backend": resolve("auto", [precision("luq-fp4")], torch.device("cpu")).name, "checkpoint_every": "1epoch",
    "track": "tensorboard",
}  # fmt: skip


def two_data_sets():
    """Two private data sets: other pixels, labels and numbers of records; some of the first cannot be read."""
    real = data.load("digits").train
    generator = torch.Generator().manual_seed(0)
    random_pixels = torch.randint(0, 9, (RECORDS, *real.pixels.shape[1:]), generator=generator, dtype=torch.uint8)
    first = random_pixels, torch.full((RECORDS,), 3), torch.arange(RECORDS) % 7 > 0
    return first, (real.pixels[:OTHERS], real.targets[:OTHERS], torch.ones(OTHERS, dtype=torch.bool))


def put_images(folder, records):
    """Private records as an image folder; the test set is public."""
    public = data.load("digits").test
    tests = public.pixels[:50], public.targets[:50], torch.ones(50, dtype=torch.bool)
    for part, (pixels, targets, readable) in (("train", records), ("test", tests)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for number in range(len(targets)):
            path = folder / part / str(int(targets[number])) / f"{number}.png"
            if readable[number]:
                Image.fromarray((14 * pixels[number].squeeze()).numpy()).save(path)
            else:
                path.write_bytes(b"torn")


class Worlds:
    """Two data sets, of which one at a time is at the place that the settings name.

    Attributes:
      settings: of a run on either; the timings of one run decide in all.
    """

    def __init__(self, folder):
        self._place, self._worlds = folder / "images", [folder / "one", folder / "other"]
        for world, records in zip(self._worlds, two_data_sets(), strict=True):
            put_images(world, records)
        self.settings = {**SETTINGS, "data": f"image-folder:{self._place}"}
        self.put(0)
        left_behind(folder / "measured", self.settings)
        self.settings["choices"] = str(folder / "measured" / "choices.json")

    def put(self, number):
        """Put one of the data sets at the place."""
        self._place.unlink(missing_ok=True)
        self._place.symlink_to(self._worlds[number])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return Worlds(tmp_path_factory.mktemp("worlds"))


def assert_no_interference(worlds, tmp_path, *, given=None, **planted):
    found = []
    for number, name in enumerate("ab"):
        worlds.put(number)
        found.append(left_behind(tmp_path / name, {**worlds.settings, **(given or {})}, **planted))
    first, second = found
    assert first["record"]["steps"] == 8 and len(first["progress"]) == 8
    assert first["record"]["epsilon_analysis_share"] > 0
    # Names only: where CI is set pytest would work out a difference of 20,000 lines of numbers, for hours.
    assert [what for what, value in first.items() if value != second[what]] == []


@pytest.mark.always
def test_what_a_run_leaves_behind_depends_on_its_records_through_the_mechanisms_only(worlds, tmp_path):
    assert_no_interference(worlds, tmp_path)


class TellingTheSize(Silent):
    """The size of the batch in the place of the sum."""

    def _clipped_sum(self, pieces, key):
        pieces = list(pieces)
        total, size = super()._clipped_sum(pieces, key), sum(piece.num_examples for piece in pieces)
        return ClippedSum({name: torch.full_like(grad, size) for name, grad in total.grads.items()}, total.sensitivity)


class TellingTheGradients(Silent):
    def _clipped_sum(self, pieces, key):
        return PrivateTraining._clipped_sum(self, pieces, key)


class KeepingSome(Silent):
    """A buffer that takes in the data."""

    def _clipped_sum(self, pieces, key):
        pieces = list(pieces)
        self.model.register_buffer("seen", torch.stack([piece.data[0].mean() for piece in pieces]).nan_to_num()[:1])
        return super()._clipped_sum(pieces, key)


@pytest.mark.always
@pytest.mark.parametrize(
    "planted",
    [
        {"make_run": TellingTheSize},
        {"make_run": TellingTheGradients},
        {"given": {"unsafe_metrics": True}},
        {"given": {"track_unsafe": True}},
    ],
    ids=["batch size", "gradients", "training accuracy", "times in a tracker"],
)
def test_interference_is_caught(planted, worlds, tmp_path):
    with pytest.raises(AssertionError):
        assert_no_interference(worlds, tmp_path, **planted)


@pytest.mark.parametrize("every", ["1epoch", "1step"])
def test_a_buffer_that_takes_in_the_data_ends_the_run_and_is_not_kept(every, worlds, tmp_path):
    with pytest.raises(dpquant.ModelError, match="buffer seen has begun to change"):
        assert_no_interference(worlds, tmp_path, make_run=KeepingSome, given={"checkpoint_every": every})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("choices.json", "config.toml", "ledger.jsonl", "model.json", "records.json", "progress.json", "checkpoints"),
        "trackers",
    }
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000000"]


class SecondsInTheMetrics(RunDirectory):
    def keep(self, model, choices, timings):
        super().keep(model, choices, timings)
        append_line(self.path / METRICS, json.dumps({"seconds": time.perf_counter()}))


class SecondsInTheRecord(RunDirectory):
    def end(self, record, timings):
        super().end(record, timings)
        fields = json.loads(record.to_json())
        (self.path / RECORD).write_text(json.dumps({**fields, "seconds": time.perf_counter()}))


class FittedNormalisation(RunDirectory):
    """The mean of the private pixels in the place of a constant."""

    def know_records(self, train_set, *, apart=False):
        super().know_records(train_set)
        self.train_set = train_set

    def describe(self, description):
        super().describe(description)
        fields = json.loads((self.path / DESCRIPTION).read_text())
        fields["normalisation"]["mean"] = float(self.train_set.pixels.float().mean())
        (self.path / DESCRIPTION).write_text(json.dumps(fields))


def test_a_normalisation_that_is_fitted_to_the_records_is_caught(worlds, tmp_path):
    with pytest.raises(AssertionError, match="description"):
        assert_no_interference(worlds, tmp_path, directory=FittedNormalisation)


@pytest.mark.parametrize("planted", [SecondsInTheMetrics, SecondsInTheRecord])
def test_a_clock_in_what_is_released_is_caught(planted, worlds, tmp_path):
    with pytest.raises(AssertionError):
        assert_no_interference(worlds, tmp_path, directory=planted)
