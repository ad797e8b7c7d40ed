# SPDX-License-Identifier: Apache-2.0
"""Runs on packed records: the same as on their source, known again by the manifest, and within little memory."""

import json

import pytest
import torch
from benchmarks.data import ROW_BYTES, memory

from dpquant.app.cli import run
from dpquant.data.dataset import Dataset
from dpquant.data.manifest import MANIFEST
from dpquant.data.pack import pack
from dpquant.data.packed import PackedRows, load_packed
from dpquant.data.rows import Rows
from dpquant.errors import DataError
from dpquant.runs.directory import RunDirectory
from dpquant.training.private import PrivateTraining
from items import trained
from sources import SPEC, TINY, as_options, table


def rows(count=40):
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (count,), generator=random)
    return Rows(torch.randn(count, 6, generator=random), targets, torch.ones(count, dtype=torch.bool))


def packed(source, folder):
    facts = {"name": "table:t", "num_classes": 5, "input_shape": (6,), "class_names": tuple("abcde")}
    pack(lambda store: Dataset(train=source, test=source, public_size=None, **facts), folder)
    return load_packed(f"packed:{folder}", folder).train


class Neighbours(PackedRows):
    """A plant: each record is read from its neighbour's row."""

    def _some(self, ids):
        return super()._some(ids ^ 1)


def test_a_run_on_packed_records_is_the_run_on_their_source_bit_for_bit(tmp_path):
    source = rows()
    found = packed(source, tmp_path / "out")
    planted = Neighbours(found.files, found.targets, found.readable, found.manifest)
    first, same, other = (
        torch.cat([p.detach().flatten() for p in trained(one, PrivateTraining).model.parameters()])
        for one in (source, found, planted)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_run_that_continues_refuses_another_manifest(tmp_path):
    """The records that are compared themselves are the same: only the manifest tells."""
    source, changed = rows(1000), rows(1000)
    changed.inputs[1] += 1  # between two of those that are compared
    ours, theirs = packed(source, tmp_path / "a"), packed(changed, tmp_path / "b")
    RunDirectory(tmp_path).know_records(ours)
    RunDirectory(tmp_path).know_records(packed(source, tmp_path / "c"))
    with pytest.raises(DataError, match="training records with which the run was begun"):
        RunDirectory(tmp_path).know_records(theirs)


def pack_a_table(folder):
    """Write a table and pack it into p/, by the command line."""
    given = {name: value for name, value in table(folder).items() if name not in TINY}
    return run(["pack", given.pop("data"), "p", *as_options(given)])


def train_on_it(*options):
    return run(["train", "--data", "packed:p", *as_options(TINY), "--out", "r", *options])


def test_a_table_is_packed_and_trained_on_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pack_a_table(tmp_path) == 0
    assert run(["pack", "--verify", "p"]) == 0
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    assert "as it was packed" in capsys.readouterr().out
    assert train_on_it("--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "mlp" and record["source"] == {
        "task": "rare positives", "spec": SPEC, "label_column": "label"
    }  # fmt: skip
    assert "balanced_accuracy" in record["metrics_test"]


def test_nothing_that_a_run_releases_holds_the_hash_of_the_manifest(tmp_path, monkeypatch, capsys):
    """It would confirm a guess of the whole data set. Neither do sizes and hashes of files, which the manifest has."""
    monkeypatch.chdir(tmp_path)
    assert pack_a_table(tmp_path) == 0
    assert train_on_it() == 0
    capsys.readouterr()
    manifest = load_packed("packed:p", tmp_path / "p").train.manifest
    files = json.loads((tmp_path / "p" / MANIFEST).read_text())["files"]
    hashes = {manifest, *(facts["sha256"] for facts in files.values())}
    written = [path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert not [one for one in hashes for content in written if one.encode() in content]


def test_a_run_takes_less_memory_than_its_records(tmp_path):
    records = 100_000
    found = memory(tmp_path, records)
    assert found["records"] == records
    assert found["peak_mib"] - found["imported_mib"] < records * ROW_BYTES[0] / 2**20
