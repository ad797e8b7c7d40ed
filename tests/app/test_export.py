# SPDX-License-Identifier: Apache-2.0
"""`dpquant export` copies what a run releases and nothing else, all of which depends on records by mechanisms only.

The second is the non-interference test for the exported folder: with the mechanisms' results held fixed, two private
data sets of other values, labels and sizes give the same bytes.
"""

import dataclasses
import functools
import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpquant.app.cli import run as command
from dpquant.app.export import STATEMENT, SUMS, _public, export
from dpquant.errors import SettingError
from dpquant.privacy.disk import Disk
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.runs.directory import RunDirectory
from dpquant.runs.evaluation import per_example_loss
from dpquant.runs.names import CONFIG, DESCRIPTION, LEDGER, MODEL, PROGRESS, RECORD, REPORT, SPENT, TIMINGS
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, from_toml
from dpquant.runs.timings import NOT_FOR_RELEASE
from dpquant.runs.train import train
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private
from mechanisms import Silent, with_doubles

FILES = {MODEL, RECORD, CONFIG, DESCRIPTION, STATEMENT, SPENT, SUMS}


def put_images(folder, count, seed, broken=()):
    """Private images in place of those that were there, some of which are torn; the test set is always the same."""
    shutil.rmtree(folder, ignore_errors=True)
    for part, number, start in (("train", count, seed), ("test", 8, 99)):
        generator = torch.Generator().manual_seed(start)
        pixels = torch.randint(0, 256, (number, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (number,), generator=generator).tolist()
        for label in range(3):
            (folder / part / str(label)).mkdir(parents=True)
        for index, label in enumerate(labels):
            path = folder / part / str(label) / f"{index}.png"
            Image.fromarray(pixels[index].numpy()).save(path)
            if part == "train" and index in broken:
                path.write_bytes(b"torn")


def settings_of(images, **others):
    given = {
        "data": f"image-folder:{images}", "image_size": 8, "model": "mlp", "width": 0.1, "epochs": 2, "batch_size": 8.0,
        "sample_rate": 0.5, "lr": 0.01, "microbatch_size": 16, "backend": "simulate", "policy": "dpquant", **others,
    }  # fmt: skip
    return TrainSettings.chosen(given)


def silently(*arguments, make_run=Silent, **keywords):
    """Start a run whose mechanisms give the same in every run."""
    run, constant = make_private(*arguments, **keywords), NoiseSource.from_seed(0).gaussian
    run.__class__ = make_run
    run._mechanism = with_doubles(run._mechanism, gaussian=lambda honest, *a, **k: constant(*a, **k))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended."""
    home = tmp_path_factory.mktemp("private-home")
    put_images(home / "images", 20, seed=0)
    train(settings_of(home / "images"), home / "run", command=f"dpquant train --data image-folder:{home / 'images'}")
    return home / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def exported(run, folder, capsys):
    """What `dpquant export --json` says."""
    assert command(["export", str(run), str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_an_export_holds_what_is_released_with_its_sums(run, finished, tmp_path, capsys):
    (run / "notes.txt").write_text("of the operator")
    done = exported(run, tmp_path / "out", capsys)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files.keys() == FILES
    sums = dict(line.split("  ")[::-1] for line in files[SUMS].decode().splitlines())
    assert sums == {name: hashlib.sha256(files[name]).hexdigest() for name in FILES - {SUMS}}
    assert {one["name"]: one["sha256"] for one in done["copied"]} == sums
    assert files[MODEL] == (finished / MODEL).read_bytes() and load_file(tmp_path / "out" / MODEL)
    assert not any(str(finished.parent).encode() in content for content in files.values())
    everything = {path.name for path in run.iterdir()}
    operators = {LEDGER, TIMINGS, PROGRESS, "records.json", "checkpoints", "notes.txt"}
    assert set(done["left"]) == everything - FILES >= operators


def test_record_settings_and_ledger_of_an_export_say_what_the_run_said(run, tmp_path, capsys):
    out = tmp_path / "out"
    done = exported(run, out, capsys)
    own, record = RunRecord.read(run / RECORD), RunRecord.read(out / RECORD)
    changed = {f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(record, f.name)}
    assert changed == {"command", "dataset"} and record.dataset == "image-folder:images"
    settings = TrainSettings.chosen(from_toml(out / CONFIG))
    assert dataclasses.replace(settings, data="") == dataclasses.replace(
        TrainSettings.chosen(from_toml(run / CONFIG)), data=""
    )
    assert (out / STATEMENT).read_text().strip() == own.statement.strip() == done["statement"].strip()
    spent, contents = json.loads((out / SPENT).read_text()), Ledger.verify(run / LEDGER)
    assert spent["head"] == contents.head == done["head"] and spent["epsilon"] == own.epsilon == done["epsilon"]
    assert spent["events"] == [dataclasses.asdict(event) for event in contents.events] and spent["steps"] == 4
    assert set(spent) == {  # not how often a process has begun
        "epsilon", "delta", "steps", "analyses", "research", "head", "run", "format", "dpquant", "neighbours", "public",
        "events",
    }  # fmt: skip


def test_settings_that_state_a_default_without_effect_can_be_exported(run, tmp_path, capsys):
    text = "".join(line for line in (run / CONFIG).read_text().splitlines(True) if not line.startswith("policy"))
    (run / CONFIG).write_text(f'policy = "rotate"\n{text}')  # in which nothing of the analyses has an effect
    assert exported(run, tmp_path / "out", capsys)["copied"]
    with pytest.raises(SettingError, match="it would be ignored"):  # as if a user had given each setting
        TrainSettings.chosen(from_toml(run / CONFIG))


def test_an_export_says_what_was_copied_and_what_was_left(run, tmp_path, capsys):
    assert command(["export", str(run), str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (f"{MODEL} copied", f"{TIMINGS} left the operator's own", "The ledger is sound", "one record"):
        assert words in shown, words
    assert command(["export", "--help"]) == 0
    help = capsys.readouterr().out
    assert "Example: dpquant" in help and all(name in help for name in exported(run, tmp_path / "again", capsys))


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("<p>epsilon</p>", None),
        ("<p>{images}</p>", "folders of this machine"),
        (f"<p>{NOT_FOR_RELEASE} 3 s</p>", "times"),
    ],
    ids=["numbers of the record", "a folder", "times"],
)
def test_a_report_is_copied_unless_it_shows_what_is_the_operators(page, why, run, finished, tmp_path, capsys):
    (run / REPORT).write_text(page.format(images=finished.parent / "images"))
    done = exported(run, tmp_path / "out", capsys)
    assert (tmp_path / "out" / REPORT).exists() == (why is None)
    assert (why or "") in done["left"].get(REPORT, "")


def test_a_report_that_may_show_training_accuracy_is_left(run, tmp_path, capsys):
    (run / REPORT).write_text("<p>epsilon</p>")
    dataclasses.replace(RunRecord.read(run / RECORD), unsafe_metrics=True).write(run / RECORD)
    assert "training accuracy" in exported(run, tmp_path / "out", capsys)["left"][REPORT]
    assert not (tmp_path / "out" / REPORT).exists()


def without(name):
    return lambda run, out: (run / name).unlink()


def cut(name, at):
    def change(run, out):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: at(len(content))])

    return change


def without_a_line(run, out):
    lines = (run / LEDGER).read_bytes().splitlines(keepends=True)
    (run / LEDGER).write_bytes(b"".join(lines[:2] + lines[3:]))


def charged_once_more(run, out):
    ledger = Ledger.resumed(run / LEDGER)
    (train,) = (event for event in ledger.events() if event.kind == "train")
    (run / LEDGER).unlink()
    other = Ledger(run / LEDGER)
    other.charge(kind="train", sample_rate=1.0, noise_multiplier=train.noise_multiplier, count=train.count)
    other.close()


def with_a_file_in_its_place(run, out):
    out.write_text("")


def with_something_in_it(run, out):
    out.mkdir()
    (out / "theirs").write_text("")


WRONG = {
    "a ledger with a line less": (without_a_line, 1, "line 3 of"),
    "no ledger": (without(LEDGER), 1, "no ledger.jsonl"),
    "the ledger of another run": (charged_once_more, 1, "belongs to another run"),
    "a run that has not ended": (without(RECORD), 2, "dpquant resume"),
    "no run": (without(CONFIG), 2, "directory of a run"),
    "no model": (without(MODEL), 2, "to hold the model"),
    "half a model": (cut(MODEL, lambda size: size // 2), 2, "to hold the model"),
    "half a record": (cut(RECORD, lambda size: size // 2), 2, "a run's record"),
    "a folder that holds something": (with_something_in_it, 2, "missing or empty"),
    "a file in its place": (with_a_file_in_its_place, 2, "missing or empty"),
}


@pytest.mark.parametrize(("change", "code", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_released_is_one_line_and_nothing_is_made(change, code, said, run, tmp_path, capsys):
    out = tmp_path / "out"
    change(run, out)
    before = sorted(tmp_path.iterdir())
    assert command(["export", str(run), str(out)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert sorted(tmp_path.iterdir()) == before


class Full(Disk):
    def sync_folder(self, folder):
        raise OSError(28, "No space left on device")


def test_an_export_that_fails_half_way_leaves_nothing(run, tmp_path):
    with pytest.raises(SettingError, match="No space left on device"):
        export(run, tmp_path / "out", disk=Full())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# Non-interference of what is exported.


def released(folder):
    """The bytes of an export, less what follows from the run's random name and when it began."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(files[RECORD])
    del record["ledger"]["head"], record["provenance"]["run_id"], record["provenance"]["started"]
    files[RECORD] = json.dumps(record).encode()
    spent = json.loads(files[SPENT])
    files[SPENT] = json.dumps({name: spent[name] for name in spent if name not in ("run", "head")}).encode()
    files[SUMS] = b"\n".join(
        line for line in files[SUMS].splitlines() if not line.endswith((SPENT.encode(), RECORD.encode()))
    )
    return files


def assert_exports_do_not_tell_data_sets_apart(home, *, start=silently, directory=RunDirectory, **others):
    found = []
    for name, records in (("a", {"count": 24, "seed": 1, "broken": (3, 4)}), ("b", {"count": 17, "seed": 2})):
        put_images(home / "images", **records)
        train(settings_of(home / "images", **others), home / name, start=start, directory=directory)
        export(home / name, home / f"{name}-out")
        found.append(released(home / f"{name}-out"))
    one, other = found
    assert one.keys() == other.keys() == FILES
    for name in sorted(one, key=lambda name: (name == SUMS, name)):
        assert one[name] == other[name], name


def test_an_export_depends_on_records_through_the_mechanisms_only(tmp_path):
    assert_exports_do_not_tell_data_sets_apart(tmp_path)


def test_training_accuracy_is_not_exported(tmp_path):
    assert_exports_do_not_tell_data_sets_apart(tmp_path, unsafe_metrics=True)
    records = [RunRecord.read(tmp_path / name / RECORD) for name in ("a", "b", "a-out")]
    measured = [[epoch.nonprivate_accuracy_train for epoch in record.per_epoch] for record in records]
    assert None not in measured[0] and measured[0] != measured[1] and measured[2] == [None, None]
    assert all(record.unsafe_metrics and "NOT COVERED" in record.statement for record in records)


class LossInTheRecord(RunDirectory):
    """Writes the training loss into a field of the record that is text."""

    def know_records(self, train_set, *, apart=False):
        super().know_records(train_set)
        self.train_set = train_set

    def keep(self, model, choices, timings):
        super().keep(model, choices, timings)
        with torch.no_grad():
            losses = per_example_loss(model, self.train_set.batch(torch.arange(len(self.train_set))))
        self.loss = float(losses.nanmean())

    def end(self, record, timings):
        super().end(dataclasses.replace(record, execution=f"{record.execution}; loss {self.loss}"), timings)


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        ({"directory": LossInTheRecord}, RECORD),
        ({"start": functools.partial(silently, make_run=PrivateTraining)}, MODEL),
    ],
    ids=["the loss in the record", "gradients"],
)
def test_an_export_that_tells_data_sets_apart_is_caught(planted, where, tmp_path):
    with pytest.raises(AssertionError, match=f"^{where}"):
        assert_exports_do_not_tell_data_sets_apart(tmp_path, **planted)


def test_settings_lose_the_folders_of_every_file_they_name():
    settings = TrainSettings.chosen(
        {
            "data": "text:/home/ann/t.csv",
            "test": "/home/ann/e.csv",
            "tokenizer": "/home/ann/bert",
            "model": "hf:/home/ann/bert",
            "records": 2000,
        }
    )
    public = _public(settings)
    assert "ann" not in public.to_toml()
    assert (public.data, public.test, public.tokenizer, public.model) == ("text:t.csv", "e.csv", "bert", "hf:bert")
