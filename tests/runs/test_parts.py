# SPDX-License-Identifier: Apache-2.0
"""Processes with data of their own: whether these fit together, and whether the files are the same. Threads here."""

import pytest
from PIL import Image

from dpquant.errors import DataError, DPQuantError, SettingError
from dpquant.runs.directory import RunDirectory
from dpquant.runs.parts import _places, _server, check_parts
from dpquant.runs.settings import TrainSettings
from dpquant.runs.shared import SharedDirectory
from dpquant.runs.sources import dataset_of
from groups import each


def images(folder, classes=("a", "b"), shade=0):
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 40 * number + shade).save(folder / split / name / "0.png")
    return folder


def settings(folder, **given):
    return TrainSettings.chosen({"data": f"image-folder:{folder}", "records": 100, "partition": "range", **given})


def checked(*folders, **given):
    """What the processes come to whose data lie in these folders."""

    def check(group):
        own = settings(folders[group.rank], **given)
        try:
            return check_parts(group, own, dataset_of(own))
        except DPQuantError as error:
            return error

    results, made = each(len(folders), check)
    assert all(one == made[0] for one in made)
    assert len({str(one) for one in results}) == 1, results
    return results[0]


def test_parts_in_other_folders_fit_together(tmp_path):
    assert checked(*(images(tmp_path / name) for name in "xyz")) is None


def test_the_same_files_are_refused_on_all(tmp_path):
    images(tmp_path / "x"), images(tmp_path / "y")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "inside").mkdir()
    for split in ("train", "test"):
        (tmp_path / "inside" / split).symlink_to(tmp_path / "x" / split)
    for other in ("x", "link", "inside"):
        error = checked(tmp_path / "x", tmp_path / "y", tmp_path / other)
        assert isinstance(error, SettingError) and "on processes 0 and 2" in str(error), other
    assert checked(tmp_path / "x", tmp_path / "x", partition="even") is None


def test_other_classes_or_forms_are_refused_on_all(tmp_path):
    images(tmp_path / "x"), images(tmp_path / "y", ("a", "c"))
    error = checked(tmp_path / "x", tmp_path / "y")
    assert isinstance(error, SettingError) and "another list of classes on process 1" in str(error)

    def check(group):
        own = settings(images(tmp_path / f"size{group.rank}"), image_size=8 + group.rank)
        with pytest.raises(SettingError, match="another form of records on process 1"):
            check_parts(group, own, dataset_of(own))
        return True

    assert each(2, check)[0] == [True, True]


def test_a_folder_that_one_server_gives_to_two_machines_is_the_same(tmp_path):
    """Device numbers differ from machine to machine; what is mounted there, and a file's number on it, does not."""
    images(tmp_path / "x"), images(tmp_path / "y")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nfiler:/export {tmp_path} nfs4 rw 0 0\nproc /proc proc rw 0 0\n")
    assert _server(tmp_path / "x", mounts) == "filer:/export"
    mine, theirs = (
        {one for one in _places(f"image-folder:{tmp_path / name}", mounts) if "filer" in one} for name in "xy"
    )
    assert mine and not mine & theirs
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\n/dev/sdb {tmp_path} ext4 rw 0 0\n")
    assert _server(tmp_path / "x", mounts) == ""


def known(folder, parts):
    """What processes with these parts come to that take up the run in a folder."""

    def know(group):
        data = dataset_of(settings(parts[group.rank])).train
        try:
            return SharedDirectory(folder, RunDirectory(folder), group).know_records(data, apart=True)
        except DPQuantError as error:
            return error

    return each(len(parts), know)[0]


def test_a_run_that_continues_knows_the_parts_of_all_whichever_process_has_which(tmp_path):
    x, y, z = (images(tmp_path / name, shade=shade) for shade, name in enumerate("xyz"))
    assert known(tmp_path, [x, y]) == [None, None]
    assert known(tmp_path, [y, x]) == [None, None], "torchrun may number the machines anew"
    for others in ([x, z], [x, x], [x, y, z]):
        errors = known(tmp_path, others)
        assert all(isinstance(one, DataError) and "records with which the run was begun" in str(one) for one in errors)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"data": "digits", "records": None}, "data of your own with partition=range"),
        ({"exact_sums": True}, "partition=even with exact_sums"),
        ({"partition": "rows"}, "one of even, range"),
    ],
)
def test_what_cannot_be_is_refused(given, says):
    with pytest.raises(SettingError, match=says):
        settings("/x", **given)


def test_one_process_has_nobody_to_compare_with(tmp_path):
    own = settings(images(tmp_path / "x"))
    assert each(1, lambda group: check_parts(group, own, dataset_of(own)))[1] == [[]]
