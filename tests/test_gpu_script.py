# SPDX-License-Identifier: Apache-2.0
"""What `scripts/gpu` runs on a GPU, in miniature on the CPU: its stages, its file of results, its packed images."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks.gpu import products, steps, table
from benchmarks.gpu.__main__ import outcome
from benchmarks.gpu.images import COLUMNS, pack, unpack
from benchmarks.gpu.report import Report
from experiments.runner import Table
from PIL import Image

from dpquant.app.bench import BenchSettings
from dpquant.app.contenders import GPU_SIDES
from dpquant.backends.geometry import Geometry
from units import BF16_HERE, INT8_HERE, OF_23_BITS, backend_of

SOON = 3600.0

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Secure RNG turned off")


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "results" / "gpu.json")


@pytest.fixture
def zipped(tmp_path) -> Path:
    """An image folder of two classes, one of which fills more than a line of a mosaic."""
    generator = np.random.default_rng(0)
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, count in {"train/a": COLUMNS + 3, "train/b": 2, "test/a": 1, "test/b": 1}.items():
            for number in range(count):
                file = tmp_path / "one.png"
                Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8)).save(file)
                archive.write(file, f"set/{name}/{number:05d}.png")
    return path


def pixels(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.rglob("*.png"))
    return {str(file.relative_to(folder)): np.asarray(Image.open(file)) for file in files}


def test_results_are_kept_one_by_one_and_over_processes(report):
    report.put("steps", "a", 1)
    Report(report.path).put("table", "b", [2])
    assert Report(report.path).read() == {"steps": {"a": 1}, "table": {"b": [2]}}


def test_packed_images_are_the_same_images(zipped, tmp_path):
    pack(zipped, tmp_path / "packed.zip", quality=100)
    assert unpack(zipped, tmp_path / "plain") == unpack(tmp_path / "packed.zip", tmp_path / "unpacked") == 100
    expected, found = pixels(tmp_path / "plain"), pixels(tmp_path / "unpacked")
    assert len(expected) == COLUMNS + 7 and expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_what_was_packed_with_loss_says_so(zipped, tmp_path):
    pack(zipped, tmp_path / "packed.zip", quality=50)
    assert unpack(tmp_path / "packed.zip", tmp_path / "unpacked") == 50


def test_every_side_for_a_gpu_is_right(report):
    tiny = BenchSettings(model="cnn", batch_size=6, image_size=8, rounds=1, threads=1)
    steps.run(report, time.monotonic() + SOON, [tiny])
    sides = report.read()["steps"]["cnn"]["sides"]
    assert {name: side["status"] for name, side in sides.items()} == dict.fromkeys(GPU_SIDES, "measured")


def test_steps_end_at_the_deadline(report):
    steps.run(report, time.monotonic() - 1, [BenchSettings(model="cnn")])
    assert report.read()["steps"] == {"cnn": "not run: no time was left"}


def test_products_are_compared_and_timed(report):
    """On stand-ins for a GPU's units, of which one is found out."""
    carriers = (BF16_HERE, INT8_HERE, OF_23_BITS)
    layer = ("conv", Geometry(kernel=(2, 2)), (3, 2, 2, 2), 3, (3, 3))
    backend = backend_of(*carriers)
    products.run(
        report,
        time.monotonic() + SOON,
        device="cpu",
        backend=backend,
        carriers=carriers,
        layers=[layer],
        lengths=[256, 4096],
    )
    found = report.read()["products"]
    assert found["exactness of int8"]["e3m0, 4096 terms"] == "exact"
    assert found["quantizer"]["exact"] and found["quantizer"]["ms"] > 0
    exact = {name: way["exact"] for name, way in found["conv"]["forward"].items()}
    assert exact.pop("bfloat16") in (True, False) and all(exact.values()) and "the backend's choice" in exact
    assert all(way["exact"] for way in found["conv"]["norms"].values()) and found["conv"]["norms"]


TABLE = Table(name="main", title="", common="--data image-folder:GTSRB", rows={"none": "--policy none"}, seeds=(0, 1))


class Launched(list):
    """Runs that end at once with a record, or fail."""

    def __init__(self, code: int = 0):
        super().__init__()
        self._code = code

    def __call__(self, command, **settings):
        self.append((command, settings))
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "record.json").write_text(json.dumps(dict.fromkeys(table.KEPT, 0.5)))
        return subprocess.CompletedProcess(command, self._code, stderr="error: no")


def test_the_table_runs_on_the_device_with_the_images(report, zipped):
    launched = Launched()
    table.run(report, time.monotonic() + SOON, zipped, device="cuda:1", table=TABLE, launch=launched)
    results = report.read()["table"]
    assert results["none, seed 0"]["accuracy_test"] == results["none, seed 1"]["accuracy_test"] == 0.5
    command, settings = launched[0]
    assert "--device cuda:1" in " ".join(command) and 0 < settings["timeout"] <= SOON
    assert not any("GTSRB" in word for word in command)


def test_a_run_of_the_table_that_fails_is_reported_and_the_next_begins(report, zipped):
    launched = Launched(code=2)
    table.run(report, time.monotonic() + SOON, zipped, table=TABLE, launch=launched)
    results = report.read()["table"]
    assert len(launched) == 2 and all("error: no" in results[f"none, seed {seed}"] for seed in (0, 1))


def test_no_run_of_the_table_begins_without_time_or_images(report, zipped):
    launched = Launched()
    table.run(report, time.monotonic() - 1, zipped, table=TABLE, launch=launched)
    table.run(report, time.monotonic() + SOON, None, table=TABLE, launch=launched)
    assert not launched and report.read()["table"]["note"] == "not run: no images were given"


@pytest.mark.parametrize(
    ("program", "words"),
    [("pass", "ended after"), ("raise SystemExit(3)", "exit code 3"), ("import time; time.sleep(60)", "stopped after")],
)
def test_a_stage_that_fails_or_hangs_is_reported(program, words):
    assert words in outcome([sys.executable, "-c", program], seconds=5)


def test_without_a_gpu_the_script_says_so():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: Expected a GPU") and not result.stdout
