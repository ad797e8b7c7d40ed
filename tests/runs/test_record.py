# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import json

import pytest

from dpquant.errors import DataError
from dpquant.runs.record import LayerRecord, RunRecord, Timings, replacing

RECORD = RunRecord(
    **{
        field.name: {"str": "x", "int": 3, "float": 0.25, "bool": False, "list[float]": [0.5, 0.75]}.get(
            field.type if isinstance(field.type, str) else getattr(field.type, "__name__", ""), [0.5, 0.75]
        )
        for field in dataclasses.fields(RunRecord)
        if field.name != "layers"
    },
    layers=[LayerRecord(name="conv", macs=9.0, times_quantized=2, last_score=None, gain=1.5)],
)


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path):
    RECORD.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # no draft is left


@pytest.mark.parametrize(
    "change", [lambda d: d.pop("epsilon"), lambda d: d.update(loss=1.0), lambda d: d.pop("layers")]
)
def test_a_missing_or_unknown_field_is_refused(change):
    fields = json.loads(RECORD.to_json())
    change(fields)
    with pytest.raises(DataError, match="Expected a run's record"):
        RunRecord.from_json(json.dumps(fields))


def test_a_file_that_is_no_record_is_one_error(tmp_path):
    with pytest.raises(DataError, match="readable record"):
        RunRecord.read(tmp_path / "none.json")
    with pytest.raises(DataError, match="Expected a run's record"):
        RunRecord.from_json("{")


def assert_no_times(text):
    """No field of a record is one of the clock."""
    assert not [name for name in json.loads(text) if "seconds" in name or "per_second" in name]


def test_a_record_holds_no_times():
    assert_no_times(RECORD.to_json())


CLOCK = {"seconds_train": 1.5, "seconds_analysis": 0.5, "seconds_total": 3.0, "samples_per_second": 99.0}


@pytest.mark.parametrize("name", CLOCK)
def test_a_time_in_a_record_would_be_seen(name):
    with pytest.raises(AssertionError):
        assert_no_times(json.dumps({**json.loads(RECORD.to_json()), name: CLOCK[name]}))


def test_a_record_of_the_older_form_is_read_without_its_times():
    assert RunRecord.from_json(json.dumps({**json.loads(RECORD.to_json()), **CLOCK})) == RECORD


TIMINGS = Timings(
    seconds_total=3.0,
    seconds_train=1.5,
    seconds_analysis=0.5,
    seconds_at_epoch_ends=[1.0, 2.0],
    examples_per_second=9.0,
)


def test_timings_come_back_and_begin_with_whose_they_are(tmp_path):
    TIMINGS.write(tmp_path / "timings.json")
    assert Timings.read(tmp_path / "timings.json") == TIMINGS
    first, *_ = json.loads((tmp_path / "timings.json").read_text()).items()
    assert first[0] == "note" and "not for release" in first[1]


def test_timings_that_are_not_there_are_none_and_others_are_one_error(tmp_path):
    assert Timings.read(tmp_path / "timings.json") is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "timings.json").write_text(text)
        with pytest.raises(DataError, match="readable timings"):
            Timings.read(tmp_path / "timings.json")


def in_place(path):
    """The fault that `replacing` prevents: the file itself is what is written to."""
    return contextlib.nullcontext(path)


def assert_survives_a_stop(replacing, folder):
    """A writer that stops half-way leaves the former file, and nothing else."""
    path = folder / "a.txt"
    path.write_text("former")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as draft:
        draft.write_text("hal")
        raise KeyboardInterrupt
    assert path.read_text() == "former" and list(folder.iterdir()) == [path]
    with replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and list(folder.iterdir()) == [path]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    assert_survives_a_stop(replacing, tmp_path)


def test_writing_in_place_would_be_seen(tmp_path):
    with pytest.raises(AssertionError):
        assert_survives_a_stop(in_place, tmp_path)
