# SPDX-License-Identifier: Apache-2.0
"""`dpquant evaluate`: numbers of the test set, which are not protected; or one, with noise, and nothing else.

The second is tested by non-interference: with the noise held fixed, test records that differ in everything but the
number of right answers give the same bytes everywhere.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from torch import nn

import dpquant
from dpquant.app.cli import run as command
from dpquant.app.evaluate import evaluate, release_accuracy
from dpquant.app.verify import verify
from dpquant.data.rows import Rows
from dpquant.data.task import Task
from dpquant.errors import DataError, SettingError
from dpquant.privacy import releases
from dpquant.privacy.noisy_count import noisy_count
from dpquant.privacy.releases import Release
from dpquant.privacy.secret import SecretKey
from dpquant.runs.evaluated import UNPROTECTED, Evaluation
from dpquant.runs.held_out import held_out
from dpquant.runs.loading import described
from dpquant.runs.measures import count_right, measured
from dpquant.runs.names import EVALUATION, MODEL, RECORD, RELEASES, REPORT
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train
from sources import images, regression, runs_on, table, texts

MAKE = {"images": images, "table": table, "regression": regression, "texts": texts}
NAMES = tuple(MAKE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{kind: a run on such records that has ended}."""
    return runs_on(MAKE, tmp_path_factory.mktemp)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run on images, to be changed."""
    return shutil.copytree(finished["images"], tmp_path / "run")


def evaluated(run, *options, capsys):
    """What `evaluate --json` prints, which is what it writes."""
    capsys.readouterr()
    assert command(["evaluate", str(run), *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == (run / EVALUATION).read_text()
    assert Evaluation.read(run / EVALUATION).to_json() == captured.out
    return json.loads(captured.out)


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_of_the_run_s_own_test_records_agrees_with_its_record(name, finished, tmp_path, capsys):
    run = shutil.copytree(finished[name], tmp_path / "run")
    found, record = evaluated(run, capsys=capsys), RunRecord.read(run / RECORD)
    assert found["accuracy"] == record.accuracy_test and found["model_sha256"] == record.model_sha256
    assert found["statement"].startswith(UNPROTECTED) and found["protected"] is None
    if name == "regression":
        assert found["errors"]["mean_absolute_error"] == pytest.approx(record.metrics_test["mean_absolute_error"])
        assert found["classes"] is found["confusion"] is found["ranking"] is None
        return
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"] <= 1
    assert sum(map(sum, found["confusion"])) == found["records"]
    assert [one["name"] for one in found["classes"]] == described(run).class_names
    if name == "table":
        assert found["ranking"]["average_precision"] == record.metrics_test["average_precision"]


class Fixed(nn.Module):
    """Returns what it is given."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor


def some_rows(count=200, classes=2):
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (count,), generator=random)
    outputs = torch.randn(count, classes, generator=random) + 2 * nn.functional.one_hot(targets, classes)
    return Rows(outputs, targets, torch.ones(count, dtype=torch.bool))


def test_measures_are_scikit_learn_s():
    split = some_rows()
    found = measured(Fixed(), split, Task(), ["no", "yes"])
    guesses, scores = split.inputs.argmax(1), split.inputs.softmax(1)[:, 1]
    assert found["accuracy"] == sklearn_metrics.accuracy_score(split.targets, guesses)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(split.targets, guesses).tolist()
    for place, one in enumerate(found["classes"]):
        assert one.precision == sklearn_metrics.precision_score(split.targets, guesses, pos_label=place)
        assert one.recall == sklearn_metrics.recall_score(split.targets, guesses, pos_label=place)
    ranking = found["ranking"]
    assert ranking.roc_auc == pytest.approx(sklearn_metrics.roc_auc_score(split.targets, scores))
    assert ranking.average_precision == pytest.approx(sklearn_metrics.average_precision_score(split.targets, scores))
    assert sum(one.count for one in ranking.calibration) == 200 and 0 < ranking.calibration_error < 0.2
    n, p, z = 200, found["accuracy"], 1.959963984540054  # Wilson 1927
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx(interval)


def test_classes_without_records_or_guesses_and_unreadable_records_are_told():
    split = some_rows(40, classes=3)
    split.targets[:] = 0
    split.inputs[:, 2] = -9
    split.readable[:10] = False
    found = measured(Fixed(), split, Task(), ["a", "b", "c"])
    assert (found["records"], found["unreadable"]) == (40, 10) and sum(map(sum, found["confusion"])) == 30
    assert found["classes"][2].precision is None and found["classes"][2].recall is None
    assert found["accuracy"] * 40 == found["confusion"][0][0] and found["classes"][0].support == 30
    two = Rows(split.inputs[:, :2].contiguous(), split.targets, split.readable)
    ranking = measured(Fixed(), two, Task(), ["a", "b"])["ranking"]
    assert ranking.roc_auc is ranking.average_precision is None


def test_rare_positives_are_evaluated_with_their_declared_share():
    split = Rows(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
    rare = Task(kind="rare positives", prior=0.1)
    assert measured(Fixed(), split, rare, ["no", "yes"])["accuracy"] == 1.0 == count_right(Fixed(), split, rare) / 2
    half = Task(kind="rare positives", prior=0.5)
    assert measured(Fixed(), split, half, ["no", "yes"])["accuracy"] == 0.5 == count_right(Fixed(), split, half) / 2


# Other test records


def photos(folder, *, dark=3, bright=3, level=190, size=8):
    """New images in folders named after classes."""
    random = np.random.default_rng(dark + 10 * bright)
    for name, count, grey in (("dark", dark, 60), ("bright", bright, level)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = (grey + random.integers(-20, 20, (size, size))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"image-folder:{folder}"


def test_other_images_are_read_as_the_run_s_were(run, tmp_path, capsys):
    found = evaluated(run, "--data", photos(tmp_path / "new", dark=4, size=20), capsys=capsys)
    assert found["records"] == 7 and found["data"] == "image-folder:new"
    assert [one["support"] for one in found["classes"]] == [3, 4]  # bright, dark
    shutil.rmtree(tmp_path / "new" / "bright")
    found = evaluated(run, "--data", f"image-folder:{tmp_path / 'new'}", capsys=capsys)
    assert (found["records"], found["unreadable"]) == (4, 0)
    (tmp_path / "new" / "dark" / "0.png").write_bytes(b"torn")
    assert command(["evaluate", str(run), "--data", f"image-folder:{tmp_path / 'new'}"]) == 2
    assert f"{tmp_path / 'new' / 'dark' / '0.png'} is not" in capsys.readouterr().err


def test_other_rows_and_texts_are_read_as_the_run_s_were(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("country,label,amount\nAT,no,3\nDE,yes,90\n")
    run = shutil.copytree(finished["table"], tmp_path / "rows")
    found = evaluated(run, "--data", f"table:{tmp_path / 'new.csv'}", capsys=capsys)
    assert found["records"] == 2 and found["data"] == "table:new.csv"
    (tmp_path / "new.jsonl").write_text('{"text": "good day", "label": "ham"}\n{"text": "bad", "label": "spam"}\n')
    run = shutil.copytree(finished["texts"], tmp_path / "texts")
    assert evaluated(run, "--data", f"text:{tmp_path / 'new.jsonl'}", capsys=capsys)["records"] == 2


def test_an_evaluation_stands_in_the_report_and_is_verified(run, capsys):
    assert command(["report", str(run)]) == 0
    assert UNPROTECTED not in (run / REPORT).read_text()
    found = evaluated(run, capsys=capsys)
    page = (run / REPORT).read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert UNPROTECTED in text and f"accuracy {100 * found['accuracy']:.2f} %" in text and "Confusion matrix" in page
    assert verify(run).holds and "evaluation: of this model" in [one.what for one in verify(run).findings]
    (run / EVALUATION).write_text(json.dumps({**found, "model_sha256": "0" * 64}))
    assert not verify(run).holds
    (run / EVALUATION).write_text("{")
    assert not verify(run).holds
    assert command(["report", str(run)]) == 2 and "to hold an evaluation" in capsys.readouterr().err


def test_a_report_that_is_made_again_leaves_out_what_was_left_out(run, capsys):
    assert command(["report", str(run), "--redact"]) == 0
    evaluated(run, capsys=capsys)
    page = (run / REPORT).read_text()
    assert UNPROTECTED in page and "left out" in page and str(run.parent) not in page and "microbatch_size" not in page
    (run / REPORT).unlink()
    evaluated(run, capsys=capsys)
    assert not (run / REPORT).exists()


def test_an_evaluation_is_not_exported_nor_a_report_that_shows_it(run, tmp_path, capsys):
    assert command(["report", str(run)]) == 0
    evaluated(run, capsys=capsys)
    release_accuracy(run, None, epsilon=1.0, records=20)
    evaluated(run, capsys=capsys)
    capsys.readouterr()
    assert command(["export", str(run), str(tmp_path / "out"), "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert "test records" in left[EVALUATION] and "test records" in left[RELEASES] and "test records" in left[REPORT]


def test_an_evaluation_is_printed_with_its_statement(run, capsys):
    assert command(["evaluate", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "95 % interval" in shown and "precision" in shown and "Confusion" in shown and UNPROTECTED in shown
    assert command(["evaluate", "--help"]) == 0
    help = capsys.readouterr().out
    assert all(name in help for name in json.loads((run / EVALUATION).read_text()) if name != "schema")


# A release with noise


def test_a_release_is_the_noisy_count_over_a_public_number(run, tmp_path):
    data = photos(tmp_path / "new", dark=30, bright=20)
    model, split = dpquant.load(run), held_out(run, Place(run).settings(), described(run), data, strict=False)
    right = count_right(model, split, Task())
    assert right == round(measured(model, split, Task(), ["bright", "dark"])["accuracy"] * 50)
    for seed in range(5):
        key = SecretKey.from_seed(seed)
        found = release_accuracy(run, data, epsilon=0.05, records=1000, key=key).protected
        assert found.accuracy == max(0, noisy_count(right, 0.05, key)) / 1000 != right / 1000
        assert found.releases == seed + 1 and found.epsilon_together == pytest.approx(0.05 * (seed + 1))
    assert release_accuracy(run, data, epsilon=0.05, records=1).protected.accuracy in (0.0, 1.0)


def test_the_noise_is_fresh(run, tmp_path):
    data = photos(tmp_path / "new")
    found = {release_accuracy(run, data, epsilon=0.05, records=1000).protected.accuracy for _ in range(12)}
    assert len(found) > 1


def test_noise_of_a_known_seed_is_said_not_to_be_private(run, tmp_path):
    data = photos(tmp_path / "new")
    for key, said in ((SecretKey.from_seed(0), True), (SecretKey(), False), (None, False)):
        found = release_accuracy(run, data, epsilon=1.0, records=6, key=key)
        assert found.statement.startswith("NOT PRIVATE") == said


def test_asking_twice_adds_up_and_is_said(run, tmp_path, capsys):
    data = photos(tmp_path / "new")
    options = ("--data", data, "--test-epsilon", "0.5", "--test-records", "6")
    once, twice = (evaluated(run, *options, capsys=capsys) for _ in range(2))
    assert once["protected"]["releases"] == 1 and "release 2" not in once["statement"]
    assert twice["protected"]["epsilon_together"] == 1.0
    assert "release 2" in twice["statement"] and "epsilon = 1.0000" in twice["statement"]
    assert command(["report", str(run)]) == 0
    page = (run / REPORT).read_text()
    assert "2 releases together: epsilon = 1.0000" in page and UNPROTECTED not in page
    assert verify(run).holds


def test_a_release_of_the_run_s_own_test_records_says_that_they_were_not_protected_before(run, tmp_path, capsys):
    found = evaluated(run, "--test-epsilon", "1", "--test-records", "20", capsys=capsys)
    assert found["statement"].startswith("NOT PROTECTED BEFORE")
    data = photos(tmp_path / "new")
    found = evaluated(run, "--data", data, "--test-epsilon", "1", "--test-records", "6", capsys=capsys)
    assert "NOT PROTECTED" not in found["statement"] and "another epsilon" in found["statement"]


def test_nothing_but_the_release_is_computed_from_private_test_records(run, tmp_path, capsys):
    found = evaluated(
        run, "--data", photos(tmp_path / "new"), "--test-epsilon", "1", "--test-records", "6", capsys=capsys
    )
    told = {name for name, value in found.items() if value is not None}
    assert told == {"schema", "data", "task", "model_sha256", "statement", "protected"}


def everything(run, folder, capsys):
    """All that a release leaves and says, with one key for the noise."""
    capsys.readouterr()
    (run / EVALUATION).unlink(missing_ok=True)
    (run / RELEASES).unlink(missing_ok=True)
    found = release_accuracy(run, f"image-folder:{folder}", epsilon=1.0, records=50, key=SecretKey.from_seed(1))
    captured = capsys.readouterr()
    files = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return files, captured, found


def assert_tells_nothing_but_the_count(run, home, capsys):
    """Two sets of test records with as many right answers, of other images, sizes, classes and broken files."""
    model = dpquant.load(run)
    photos(home / "a" / "new", dark=10, bright=10)
    right = _right(model, run, home / "a" / "new")
    photos(home / "b" / "new", dark=27, bright=0)
    for number, path in enumerate(sorted((home / "b" / "new" / "dark").iterdir())):
        if number >= right:
            path.write_bytes(b"torn")
    folders = [home / name / "new" for name in ("a", "b")]
    assert right == _right(model, run, folders[1]) > 2
    one, other = (everything(run, folder, capsys) for folder in folders)
    assert one == other


def _right(model, run, folder):
    split = held_out(run, Place(run).settings(), described(run), f"image-folder:{folder}", strict=False)
    return count_right(model, split, Task())


def test_a_release_depends_on_test_records_through_the_noisy_count_only(run, tmp_path, capsys):
    assert_tells_nothing_but_the_count(run, tmp_path, capsys)


def test_one_record_more_changes_the_count_by_at_most_one_whatever_the_model_does():
    class Fails(Fixed):
        def forward(self, x):
            if len(x) > 1 or float(x[0, 0]) > 2.5:
                raise RuntimeError(f"a record: {x}")
            return super().forward(x)

    split = some_rows(60)
    split.inputs[5] = torch.nan
    alone = [count_right(Fails(), Rows(split.inputs[i : i + 1], split.targets[i : i + 1], split.readable[:1]), Task())
             for i in range(60)]  # fmt: skip
    assert set(alone) == {0, 1} and alone[5] == 0
    for count in (1, 7, 59, 60):
        some = Rows(split.inputs[:count], split.targets[:count], split.readable[:count])
        assert count_right(Fails(), some, Task()) == sum(alone[:count])


def test_a_release_is_written_down_before_a_record_passes_the_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watching_network_of_a_test.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nimport torch\n\n"
        "class Watching(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        Path('seen').write_text(str(Path('run2/test-releases.jsonl').exists()))\n"
        "        return super().forward(x)\n\n"
        "def build(num_classes):\n    return Watching(nn.Flatten(), nn.Linear(192, num_classes))\n"
    )
    settings = {**images(tmp_path), "model": "watching_network_of_a_test:build", "width": 1.0}
    train(TrainSettings.chosen(settings), tmp_path / "run2")
    (tmp_path / "seen").unlink()
    release_accuracy(tmp_path / "run2", photos(tmp_path / "new"), epsilon=1.0, records=6)
    assert (tmp_path / "seen").read_text() == "True"
    (tmp_path / "seen").unlink()
    releases_file = tmp_path / "run2" / RELEASES
    releases_file.unlink()
    releases_file.mkdir()
    with pytest.raises(dpquant.LedgerError):
        release_accuracy(tmp_path / "run2", f"image-folder:{tmp_path / 'new'}", epsilon=1.0, records=6)
    assert not (tmp_path / "seen").exists()


def test_a_file_of_releases_that_was_edited_is_exit_code_1(run, tmp_path, capsys):
    data = photos(tmp_path / "new")
    releases.charge(run / RELEASES, Release(what="accuracy", epsilon=1.0, records=3))
    (run / RELEASES).write_text((run / RELEASES).read_text().replace("1.0", "0.1"))
    capsys.readouterr()
    assert command(["evaluate", str(run), "--data", data, "--test-epsilon", "1", "--test-records", "6"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "as it was written" in captured.err
    assert not (run / EVALUATION).exists()


# What is refused


REFUSED = {
    "no number of records": (["--test-epsilon", "1"], "Expected test_records"),
    "no test records": (["--test-epsilon", "1", "--test-records", "0"], "test_records=0"),
    "a number without epsilon": (["--test-records", "6"], "Expected no test_records without test_epsilon"),
    "no epsilon": (["--test-epsilon", "0", "--test-records", "6"], "test_epsilon=0.0"),
    "nan": (["--test-epsilon", "nan", "--test-records", "6"], "test_epsilon=nan"),
    "rows": (["--data", "table:x.csv"], "Expected images for this model"),
    "texts": (["--data", "text:x.csv"], "Expected images for this model"),
    "not there": (["--data", "image-folder:nowhere"], "not there"),
    "other classes": (["--data", "digits"], "of the model's form"),
    "unknown": (["--data", "digit"], "Did you mean digits"),
    "packed nowhere": (["--data", "packed:nowhere"], "manifest.json"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_evaluated_is_one_line_and_nothing_is_written(options, said, run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command(["evaluate", str(run), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_regression_has_no_accuracy_to_release(finished, tmp_path):
    run = shutil.copytree(finished["regression"], tmp_path / "run")
    with pytest.raises(SettingError, match="got a regression"):
        release_accuracy(run, None, epsilon=1.0, records=20)
    assert not (run / RELEASES).exists()


def test_folders_that_are_no_class_and_other_weights_are_refused(run, tmp_path, capsys):
    photos(tmp_path / "new")
    (tmp_path / "new" / "dark").rename(tmp_path / "new" / "dork")
    assert command(["evaluate", str(run), "--data", f"image-folder:{tmp_path / 'new'}"]) == 2
    assert "Did you mean dark" in capsys.readouterr().err
    data = bytearray((run / MODEL).read_bytes())
    data[-1] ^= 1
    (run / MODEL).write_bytes(bytes(data))
    for options in ([], ["--test-epsilon", "1", "--test-records", "6"]):
        assert command(["evaluate", str(run), *options]) == 2
        assert "SHA-256" in capsys.readouterr().err
    assert not (run / RELEASES).exists()


def test_a_strict_reading_names_a_row_and_a_private_one_does_not(finished, tmp_path):
    run = shutil.copytree(finished["table"], tmp_path / "run")
    (tmp_path / "new.csv").write_text("country,label,amount\nAT,no,3\nDE,perhaps,90\n")
    with pytest.raises(DataError, match="record 2"):
        evaluate(run, f"table:{tmp_path / 'new.csv'}")
    assert release_accuracy(run, f"table:{tmp_path / 'new.csv'}", epsilon=1.0, records=2).protected
