# SPDX-License-Identifier: Apache-2.0
"""Packed records are their source's, bit for bit, in its order; files that are not the manifest's are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpquant.data.dataset import Dataset, load
from dpquant.data.folders import image_folder
from dpquant.data.manifest import MANIFEST, Manifest, folder_of, kind_of
from dpquant.data.pack import pack
from dpquant.data.packed import load_packed
from dpquant.data.row_file import RowFile
from dpquant.data.rows import Rows
from dpquant.data.task import Task
from dpquant.data.texts import TextSource, form_of_texts, load_texts
from dpquant.engine.batches import leaves
from dpquant.errors import DataError, SettingError
from dpquant.training.records import Records
from words import tokenizer_in

COUNT = 40
IDS = torch.tensor([0, 3, 3, 17, COUNT - 1])


def rows(count=COUNT, *, changed=None):
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=random)
    if changed is not None:
        inputs[changed] += 1
    readable = torch.ones(count, dtype=torch.bool)
    readable[3] = False
    return Rows(inputs, torch.where(readable, torch.arange(count) % 5, -1), readable)


def of_rows(train=None, task=None):
    return Dataset(
        name="table:t.csv",
        train=train or rows(),
        test=rows(COUNT),
        num_classes=5,
        input_shape=(6,),
        class_names=tuple("abcde"),
        public_size=None,
        task=task or Task(),
        categories=(2,),
        synthetic=[(torch.arange(6.0) + n, torch.tensor(n)) for n in range(3)],
        facts={"spec": "task = 1"},
    )


def of_texts(folder, *, pairs):
    lines = []
    for number in range(COUNT):
        text = "" if number == 3 else " ".join(["good", "bad", "day"][i % 3] for i in range(1 + 7 * (number % 9)))
        lines.append(json.dumps({"a": text, "b": "night " * (number % 5 + 1), "y": ("ham", "spam")[number % 2]}))
    for name in ("t.jsonl", "e.jsonl"):
        (folder / name).write_text("\n".join(line for n, line in enumerate(lines) if n != 3 or name == "t.jsonl"))
    source = TextSource.chosen(
        folder / "t.jsonl",
        texts="a,b" if pairs else "a",
        label="y",
        classes="ham,spam",
        tokenizer=tokenizer_in(folder),
        max_length=70,
        test=folder / "e.jsonl",
        test_share=None,
    )
    train, test, tokens = load_texts(source)
    return Dataset(
        **vars(form_of_texts(source, tokens)),
        name="text:t.jsonl",
        train=train,
        test=test,
        public_size=None,
    )


def photos(folder):
    """A folder of COUNT images a split, of which record 3 of the training records cannot be decoded."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(COUNT):
            place = folder / part / ("a", "b")[number >= COUNT // 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(place / f"{number:02}.png")
    (folder / "train" / "a" / "03.png").write_bytes(b"no image")
    return folder


def packed(dataset, folder):
    pack(lambda store: dataset, folder)
    return load_packed(f"packed:{folder}", folder)


def same(first, second):
    """Whether two trees of tensors are equal to the bit; NaN equals NaN."""
    pairs = list(zip(leaves(first), leaves(second), strict=True))
    return all(
        a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
        for (_, a), (_, b) in pairs
    )


def check_equal(source, found):
    for ours, theirs in ((source.train, found.train), (source.test, found.test)):
        assert len(ours) == len(theirs)
        assert torch.equal(ours.targets, theirs.targets) and torch.equal(ours.readable, theirs.readable)
        ids = IDS.clamp(max=len(ours) - 1)
        assert same(ours.batch(ids), theirs.batch(ids)) and same(ours.batch(ids), theirs.dpquant_batch(ids))
        assert same(ours[17], theirs[17]) and same(ours[len(ours) - 1], theirs[-1])
        with pytest.raises(IndexError):
            theirs[len(theirs)]
    for name in ("num_classes", "input_shape", "class_names", "task", "categories", "vocabulary", "padding", "facts"):
        assert getattr(source, name) == getattr(found, name), name
    assert found.public_size is None
    assert (source.synthetic is None) == (found.synthetic is None)
    assert source.synthetic is None or all(map(same, source.synthetic, found.synthetic))


@pytest.mark.parametrize("regression", [False, True])
def test_packed_rows_are_the_table_s(tmp_path, regression):
    source = of_rows(task=Task(kind="rare positives", prior=0.25))
    if regression:
        train = rows()
        train.targets = torch.where(train.readable, torch.linspace(-1, 1, COUNT), torch.nan)
        source = of_rows(train, Task(kind="regression", low=0.0, high=9.0))
        train.targets[3], train.readable[3] = 0.5, True
    check_equal(source, packed(source, tmp_path / "out"))


@pytest.mark.parametrize("pairs", [False, True])
def test_packed_texts_are_the_file_s_and_have_its_buckets(tmp_path, pairs):
    source = of_texts(tmp_path, pairs=pairs)
    found = packed(source, tmp_path / "out")
    check_equal(source, found)
    everyone = torch.arange(COUNT)
    groups = source.train.dpquant_groups(everyone)
    assert torch.equal(groups, found.train.dpquant_groups(everyone)) and len(groups.unique()) > 1
    few = everyone[groups == groups[1]]
    assert same(source.train.batch(few), found.train.batch(few))


def test_packed_images_are_the_folder_s_and_a_broken_one_stays_a_record(tmp_path):
    name = f"image-folder:{photos(tmp_path / 'photos')}"
    source = load(name, image_size=8)
    pack(lambda store: load(name, image_size=8, store=store), tmp_path / "out")
    found = load_packed("packed:out", tmp_path / "out")
    check_equal(source, found)
    assert not found.train.readable[3] and found.train.batch(torch.tensor([3]))[0].isnan().all()


def test_images_are_decoded_into_the_place_that_the_caller_gives(tmp_path):
    places = {}

    def store(part, shape):
        places[part] = torch.zeros(shape, dtype=torch.uint16)
        return places[part]

    train, test, _ = image_folder(photos(tmp_path), 8, store=store)
    assert train.pixels is places["train"] and test.pixels is places["test"]


def test_microbatches_of_packed_records_are_those_of_the_source(tmp_path):
    source = of_rows()
    drawn = torch.tensor([0, 3, 5, 8, 13, 21, 34])
    found = [
        list(Records(one, torch.utils.data.default_collate, torch.device("cpu"), None).microbatches(drawn, 3, 0))
        for one in (source.train, packed(source, tmp_path / "out").train)
    ]
    assert len(found[0]) == len(found[1]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert same(ours.data, theirs.data) and torch.equal(ours.record_ids, theirs.record_ids)


def test_rows_are_read_by_position(tmp_path):
    for values in (np.arange(24, dtype=np.uint16).reshape(6, 2, 2), np.arange(6.0), np.zeros((6, 0))):
        np.save(tmp_path / "a.npy", values)
        file = RowFile(tmp_path / "a.npy")
        for ids in ([0, 1, 5], [4, 4, 2], []):
            assert np.array_equal(file.rows(torch.tensor(ids, dtype=torch.int64)).numpy(), values[ids])
        runs = file.runs(torch.tensor([3, 0, 5]), torch.tensor([5, 0, 6]))
        assert np.array_equal(runs.numpy(), values[[3, 4, 5]])
        for ids in ([6], [-1]):
            with pytest.raises(IndexError):
                file.rows(torch.tensor(ids))


def test_a_file_that_becomes_shorter_is_an_error_and_no_signal(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((100, 100)))
    file = RowFile(tmp_path / "a.npy")
    with (tmp_path / "a.npy").open("rb+") as other:
        other.truncate(4000)
    with pytest.raises(DataError, match="stay as it was"):
        file.rows(torch.tensor([99]))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no array"),
        lambda path: np.save(path, np.asfortranarray(np.ones((3, 2)))),
        lambda path: np.save(path, np.array(1.0)),
        lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
        lambda path: (np.save(path, np.ones(9)), path.write_bytes(path.read_bytes() + b"more")),
    ],
)
def test_another_file_is_no_row_file(tmp_path, write):
    write(tmp_path / "a.npy")
    with pytest.raises(DataError, match="array as dpquant pack writes"):
        RowFile(tmp_path / "a.npy")


def test_files_that_are_missing_or_changed_are_refused(tmp_path):
    packed(of_rows(), tmp_path / "out")
    path = tmp_path / "out" / "train" / "inputs.npy"
    content, manifest = path.read_bytes(), Manifest.read(tmp_path / "out")
    manifest.check(tmp_path / "out", verify=True)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    manifest.check(tmp_path / "out")  # of the same size: only its hash tells
    with pytest.raises(DataError, match="content has changed"):
        manifest.check(tmp_path / "out", verify=True)
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match="another size"):
        load_packed("packed:out", tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="not there"):
        load_packed("packed:out", tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(format=2),
        lambda found: found.update(kind="sounds"),
        lambda found: found.pop("task"),
        lambda found: found.update(other=1),
        lambda found: found["files"].update({"../train.npy": {"bytes": 1, "sha256": ""}}),
        lambda found: found["files"].update({"/train.npy": {"bytes": 1, "sha256": ""}}),
        lambda found: found["files"].update({"train/x.npy": {"bytes": "1", "sha256": ""}}),
    ],
)
def test_another_manifest_is_refused(tmp_path, change):
    packed(of_rows(), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="manifest of format 1"):
        load_packed("packed:out", tmp_path / "out")


def test_a_manifest_without_its_arrays_is_refused(tmp_path):
    packed(of_rows(), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    found = json.loads(path.read_text())
    del found["files"]["train/targets.npy"]
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="files that packed rows have"):
        load_packed("packed:out", tmp_path / "out")


def test_the_folder_is_there_completely_or_not_at_all(tmp_path):
    def fails(store):
        store("train", (2, 3, 4, 4))
        raise DataError("Expected images.")

    with pytest.raises(DataError, match="Expected images"):
        pack(fails, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(SettingError, match="new folder"):
        pack(lambda store: of_rows(), tmp_path / "out")


def test_packed_records_are_not_packed_again(tmp_path):
    found = packed(of_rows(), tmp_path / "out")
    with pytest.raises(DataError, match="not packed yet"):
        pack(lambda store: found, tmp_path / "again")


def test_the_kind_is_known_without_opening_a_record(tmp_path):
    packed(of_rows(), tmp_path / "out")
    assert kind_of(f"packed:{tmp_path / 'out'}") == "rows" and kind_of("packed:nowhere") is None
    with pytest.raises(DataError, match="without one"):
        folder_of("packed: ")
