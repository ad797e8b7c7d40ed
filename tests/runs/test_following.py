# SPDX-License-Identifier: Apache-2.0
"""The state of a run is read from its directory, whatever state that is in, and nothing in it is changed."""

import dataclasses
import datetime
import json
import shutil
import time

import pytest

from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.ledger import Ledger
from dpquant.runs.alerts import alerts
from dpquant.runs.following import Following
from dpquant.runs.heartbeat import Beat, Heartbeat
from dpquant.runs.names import CHOICES, CONFIG, DESCRIPTION, DIVERGED, LEDGER, METRICS, PROGRESS, RECORD
from dpquant.runs.record import RunRecord
from dpquant.runs.score import score_of
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Sink
from dpquant.runs.train import train

SETTINGS = {
    "model": "mlp", "width": 0.1, "epochs": 3, "batch_size": 256.0, "backend": "simulate", "microbatch_size": 64,
    "noise_multiplier": 1.0, "lr": 0.1, "policy": "dpquant",
}  # fmt: skip
NOW = datetime.datetime(2026, 11, 29, 12, 0, tzinfo=datetime.UTC).timestamp()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    train(TrainSettings.chosen(SETTINGS), out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def going(run):
    """The same while its second epoch went on: the record is not there yet, nor the last two epochs."""
    (run / RECORD).unlink()
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text(lines[0])
    beat(run, step=8, epoch=1)
    return run


def beat(run, **changes):
    """Write a heartbeat of noon."""
    fields = {
        "written": "2026-11-29T12:00:00Z", "running": True, "step": 8, "steps": 18, "epoch": 1, "epochs": 3,
        "examples_per_second": 512.0, "longest_pause": 2.0, **changes,
    }  # fmt: skip
    (run / PROGRESS).write_text(json.dumps(dataclasses.asdict(Beat(**fields))))


def after(run, seconds):
    """The state so many seconds after noon."""
    return Following(run, now=lambda: NOW + seconds).status()


def test_a_finished_run_is_as_its_record_says(run):
    status, record = Following(run).status(), RunRecord.read(run / RECORD)
    assert (status.phase, status.step, status.epsilon) == ("finished", record.steps, record.epsilon)
    assert status.score == score_of(record) and status.per_epoch == record.per_epoch
    assert status.layers == [layer.name for layer in record.layers] and status.classes == 10
    assert status.pace is None and status.trouble == "" and status.share == 1.0
    assert status.curve[-1] == pytest.approx(record.epsilon) and list(status.curve) == sorted(status.curve)


def test_a_run_that_goes_on_says_how_far_it_is_and_how_long_it_takes(going, finished):
    status, record = after(going, 1), RunRecord.read(finished / RECORD)
    assert (status.phase, status.step, status.steps, status.epochs) == ("running", 8, 18, 3)
    assert status.per_epoch == record.per_epoch[:1] and status.epsilon == record.per_epoch[0].epsilon
    assert set(status.layers) == {layer.name for layer in record.layers}
    assert status.pace.seconds_a_step == 0.5 and status.pace.seconds_left == 5.0 and status.pace.silent == 1.0
    assert status.curve[0] == pytest.approx(record.per_epoch[0].epsilon)
    assert status.score_noise is not None and not any(one.grave for one in alerts(status))


@pytest.mark.parametrize(
    ("changes", "seconds", "phase"),
    [
        ({}, 29, "running"),
        ({}, 31, "silent"),
        ({}, 299, "silent"),
        ({}, 301, "stopped"),
        ({"examples_per_second": 25.6}, 99, "running"),
        ({"examples_per_second": 25.6}, 101, "silent"),
        ({"longest_pause": 60.0}, 179, "running"),
        ({"longest_pause": 60.0}, 181, "silent"),
        ({"running": False}, 1, "stopped"),
        ({"written": "2026-11-29T13:00:00Z"}, 1, "running"),
        ({"examples_per_second": None}, 1, "running"),
    ],
    ids=str,
)
def test_silence_is_ten_usual_steps_or_three_pauses_or_half_a_minute(changes, seconds, phase, going):
    beat(going, **changes)
    assert after(going, seconds).phase == phase


def test_a_run_that_was_killed_says_what_was_charged(going):
    events = Ledger.read(going / LEDGER)
    for seconds in (31, 301):
        status = after(going, seconds)
        assert status.charged == sum(one.count for one in events if one.kind == "train")
        assert status.epsilon == accounting.epsilon(events, 1e-4)
        grave = [one for one in alerts(status) if one.grave]
        assert f"charged {status.charged} of 18 steps, epsilon {status.epsilon:.1f}"[:-1] in grave[0].text


def test_a_run_that_diverged_says_why(going):
    (going / DIVERGED).write_text("Expected parameters to stay finite.\n")
    status = after(going, 1)
    assert status.phase == "diverged" and alerts(status)[0].text == "Expected parameters to stay finite."


@pytest.mark.parametrize("name", [LEDGER, METRICS])
def test_a_torn_last_line_is_not_there_yet(name, going):
    before = after(going, 1)
    with (going / name).open("a") as file:
        file.write('{"epoch": 1, "eps')
    assert after(going, 1) == before


def test_a_line_that_was_changed_is_said(going):
    (going / METRICS).write_text("{}\n")
    data = bytearray((going / LEDGER).read_bytes())
    data[len(data) // 2] ^= 1
    (going / LEDGER).write_bytes(bytes(data))
    status = after(going, 1)
    assert "line 1 of" in status.trouble and "The ledger does not agree with itself" in status.trouble
    assert [one.kind for one in alerts(status)] == ["unreadable"]


@pytest.mark.parametrize("name", [LEDGER, METRICS, PROGRESS, CHOICES, DESCRIPTION])
def test_a_file_that_is_not_there_is_no_error(name, going):
    (going / name).unlink()
    status = Following(going).status()
    assert status.model == "mlp" and status.trouble == ""


def test_a_run_that_has_just_begun_is_starting_and_one_that_never_ended_its_start_has_stopped(going):
    for name in (LEDGER, METRICS, PROGRESS):
        (going / name).unlink()
    assert Following(going).status().phase == "starting"
    assert Following(going, now=lambda: time.time() + 3600).status().phase == "stopped"
    beat(going, step=0, examples_per_second=None)
    assert after(going, 1).phase == "starting"


def test_gains_are_those_of_the_runs_choices(going):
    made = {"choices": {"('other', 1)": "x", "('gains of layers', 64)": {"0": 0.5}}}
    (going / CHOICES).write_text(json.dumps(made))
    assert after(going, 1).gains == {"0": 0.5}
    (going / CHOICES).write_text("[]")
    assert after(going, 1).gains == {}


def test_what_is_not_there_is_waited_for_and_found_when_it_comes(finished, tmp_path):
    following = Following(tmp_path / "new" / "run")
    assert following.status().phase == "waiting"
    (tmp_path / "new" / "run").mkdir(parents=True)
    assert following.status().phase == "waiting"
    shutil.copytree(finished, tmp_path / "new" / "run", dirs_exist_ok=True)
    assert following.status().phase == "finished"


def test_what_is_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    for name in ("file", "folder"):
        with pytest.raises(SettingError, match="Expected the directory of a run"):
            Following(tmp_path / name)


def marks(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_nothing_is_changed_and_a_file_is_read_again_only_when_it_has_changed(going):
    before, following = marks(going), Following(going, now=lambda: NOW)
    first = following.status()
    assert following.status() == first and marks(going) == before
    assert following.status().curve is first.curve  # from the accountant, which takes a second
    beat(going, step=12, examples_per_second=1.0)
    assert following.status().step == 12


class Slow:
    """A reader that takes a while."""

    def __init__(self):
        self.reads = 0

    def __call__(self, path):
        self.reads += 1
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            pass
        return self.reads


def test_a_file_that_takes_long_to_read_is_left_alone_for_a_while(going):
    following, slow = Following(going), Slow()
    found = []
    for number in range(3):
        (going / LEDGER).write_text("x" * number)
        found.append(following._read(LEDGER, slow))
    assert found == [1, 1, 1] and slow.reads == 1


def test_layers_are_in_the_order_in_which_people_count(going):
    lines = [
        {"epoch": 0, "layers_quantized": ["layer10", "layer9", "fc"]},
        {"epoch": 1, "layers_quantized": ["layer1"]},
    ]
    (going / METRICS).write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert after(going, 1).layers == ["fc", "layer1", "layer9", "layer10"]
    (going / CONFIG).write_text("nonsense = 1\n")
    assert "nonsense" in after(going, 1).trouble


def test_a_run_that_continues_is_alive_while_it_still_measures(going):
    beat(going, running=False)
    assert after(going, 1).phase == "stopped"
    Heartbeat(going / PROGRESS).preparing("loading the data")
    assert Following(going).status().phase == "starting"
    assert Following(going, now=lambda: time.time() + 3600).status().phase == "stopped"


class Silent(Sink):
    pass


def test_a_run_that_says_nothing_while_it_measures_would_be_seen(going):
    """Twin of the test above: without a sign of life the run counts as stopped."""
    beat(going, running=False)
    Silent().preparing("loading the data")
    assert Following(going).status().phase == "stopped"


def test_a_resume_that_is_refused_has_stopped_again(going):
    beats = Heartbeat(going / PROGRESS)
    beats.preparing("loading the data")
    beats.close()
    assert Following(going).status().phase == "stopped"
