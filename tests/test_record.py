# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from dpquant.errors import DataError
from dpquant.record import LayerRecord, RunRecord

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
