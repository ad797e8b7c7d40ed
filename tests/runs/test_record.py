# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from dpquant.errors import DataError
from dpquant.runs.record import SCHEMA, RunRecord, replacing
from dpquant.runs.timings import Timings

FIXTURES = Path(__file__).parent / "fixtures"
"""One record of every schema that a version has ever written; none is ever changed."""


def fixture(schema):
    return (FIXTURES / f"record-{schema}.json").read_text()


RECORD = RunRecord.from_json(fixture(SCHEMA))


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path):
    RECORD.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # no draft is left


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("epsilon"),
        lambda d: d.update(loss=1.0),
        lambda d: d.pop("layers"),
        lambda d: d["layers"][0].pop("macs"),
        lambda d: d.pop("per_epoch" if "schema" in d else "accuracy_per_epoch"),
        lambda d: d.update(schema="two"),
        lambda d: d.update(schema=0),
    ],
)
def test_a_missing_or_unknown_field_is_refused(change, schema):
    fields = json.loads(fixture(schema))
    change(fields)
    with pytest.raises(DataError, match="Expected a run's record"):
        RunRecord.from_json(json.dumps(fields))


def test_a_file_that_is_no_record_is_one_error(tmp_path):
    with pytest.raises(DataError, match="readable record"):
        RunRecord.read(tmp_path / "none.json")
    for text in ("{", "[]", "3", "null"):
        with pytest.raises(DataError, match="Expected a run's record"):
            RunRecord.from_json(text)


def assert_opens(read, schema, text):
    """A record of any schema says what it said when it was written, and what it does not say is None."""
    record, written = read(text), json.loads(text)
    assert record.schema == SCHEMA and record.to_json() == read(record.to_json()).to_json()
    told = json.loads(record.to_json())
    same = written.keys() - {"schema", "accuracy_per_epoch", "per_epoch", *CLOCK}
    assert len(same) > 30 and {name: told[name] for name in same} == {name: written[name] for name in same}
    assert record.epochs == len(record.per_epoch) == len(record.accuracy_per_epoch)
    assert record.accuracy_per_epoch[-1] == record.accuracy_test
    if schema == 1:
        assert record.accuracy_per_epoch == written["accuracy_per_epoch"]
        assert all(e.epsilon is e.layers_quantized is e.scores is None for e in record.per_epoch)
    else:
        new = {"metrics_test": None} if schema < 4 else {}
        assert told["per_epoch"] == [{**epoch, **new} for epoch in written["per_epoch"]]
        assert next(iter(written)) == "schema"


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_record_of_every_schema_opens_for_ever(schema):
    assert_opens(RunRecord.from_json, schema, fixture(schema))


def test_this_version_writes_the_newest_fixture_as_it_is():
    """A field that is added, dropped or renamed needs a number of its own."""
    assert RECORD.to_json() == fixture(SCHEMA)


def the_newest_only(text):
    return RunRecord.from_json(json.dumps({"schema": SCHEMA, **json.loads(text)}))


def without_its_epochs(text):
    return dataclasses.replace(RunRecord.from_json(text), per_epoch=[])


def with_nothing_quantized(text):
    """What is not known, told as if it were."""
    record = RunRecord.from_json(text)
    per_epoch = [dataclasses.replace(epoch, layers_quantized=[], scores={}) for epoch in record.per_epoch]
    return dataclasses.replace(record, per_epoch=per_epoch)


@pytest.mark.parametrize("planted", [the_newest_only, without_its_epochs, with_nothing_quantized])
def test_an_older_record_that_does_not_open_would_be_seen(planted):
    with pytest.raises((AssertionError, DataError)):
        assert_opens(planted, 1, fixture(1))


def test_a_newer_schema_is_one_error_that_names_it():
    newer = json.dumps({**json.loads(fixture(SCHEMA)), "schema": SCHEMA + 1, "dpquant": "7.1", "fairness": 1})
    with pytest.raises(DataError, match=rf"schema 1 to {SCHEMA}; got schema={SCHEMA + 1}, written by dpquant 7\.1"):
        RunRecord.from_json(newer)


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


def test_times_in_an_older_record_are_left_out():
    assert CLOCK.keys() < json.loads(fixture(1)).keys()
    assert_no_times(RunRecord.from_json(fixture(1)).to_json())


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
