# SPDX-License-Identifier: Apache-2.0
"""Runs mutants: a copy of the tree, one bug at a time in it, and the named tests on it until one fails.

This process imports torch and the other large packages once, and never dpquant. For each mutant it forks: the child
imports dpquant from the copy and runs pytest there. So a mutant costs what its tests cost. Bugs in C++ are built in the
copy first, which needs cmake, ninja, a compiler and nanobind.
"""

import compileall
import dataclasses
import importlib
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mutants.mutant import ROOT, Mutant

MOST_SECONDS = 600.0  # after which a mutant's tests count as failed
_HEAVY = (
    "torch", "torch._dynamo", "torchvision", "scipy.stats", "dp_accounting", "hypothesis", "opacus", "sklearn.datasets",
    "safetensors.torch", "cryptography", "PIL.Image", "typer", "rich",
)  # fmt: skip
_LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "data",
    ".hypothesis",
    ".ruff_cache",
    ".pytest_cache",
    "__pycache__",
)
_FIND_THE_COPY = """import sys
sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__module__.startswith("_editable")]
sys.path.insert(0, {source!r})
"""


def warm_up() -> None:
    """Import what takes long, before the first fork."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in _HEAVY:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name.split(".")[0] == "dpquant"], "a fork would not see the copy"


class Tree:
    """A copy of the repository in which bugs are planted.

    Attributes:
      path: of the copy.
    """

    def __init__(self, path: Path):
        """Copy the tree, and put the native module beside its sources if it is installed."""
        self.path = path
        top = {name for name in _LEFT_OUT if not name.startswith("__")}
        shutil.copytree(
            ROOT,
            path,
            ignore=lambda folder, names: {
                name for name in names if (name in top and Path(folder) == ROOT) or name in ("__pycache__", ".git")
            },
        )
        # once for all children; a file with a bug in it is newer than its bytecode, which is then not used
        compileall.compile_dir(path / "src", quiet=2)
        self._package = path / "src" / "dpquant"
        (path / "site").mkdir()
        (path / "site" / "sitecustomize.py").write_text(_FIND_THE_COPY.format(source=str(path / "src")))
        self._native = path / "native.pristine"
        for built in _installed_native():
            shutil.copy(built, self._package / built.name)
            shutil.copy(built, self._native)
            self._extension = self._package / built.name

    def plant(self, mutant: Mutant) -> None:
        """Plant a bug, and build the native module if it is in C++."""
        path = self.path / mutant.file
        path.write_text(mutant.planted_in((ROOT / mutant.file).read_text()))
        if mutant.native:
            self._build()

    def restore(self, mutant: Mutant) -> None:
        """Take the bug out again. The object file with it is built anew with the next bug."""
        (self.path / mutant.file).write_text((ROOT / mutant.file).read_text())
        if mutant.native:
            self._put(self._native)

    def run(self, tests: Sequence[str], *, first_failure: bool) -> dict[str, Any]:
        "Run tests of the copy in a child process; return {passed, failed: [(test, why)], refused: what else failed}."
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(here)
            _in_the_child(self.path, tests, there, first_failure)
        os.close(there)
        found = _answer_of(child, here)
        return found or {"passed": 0, "failed": [("the process", "it ended, or took too long")], "refused": ""}

    def _build(self) -> None:
        folder = self.path / "build"
        if not (folder / "build.ninja").exists():
            options = [f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD_SABI_VERSION="]
            _quietly("cmake", "-S", str(self.path), "-B", str(folder), "-G", "Ninja", *options)
        _quietly("ninja", "-C", str(folder), "-j", os.environ.get("DPQUANT_BUILD_JOBS", "1"))
        self._put(next(folder.glob("_native*.so")))

    def _put(self, built: Path) -> None:
        draft = self._extension.with_name("draft")  # a new file: the old one may be mapped into this process
        shutil.copy(built, draft)
        draft.replace(self._extension)


def _installed_native() -> list[Path]:
    endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    found = [Path(place) / "dpquant" for place in sys.path]
    return [
        file for folder in found if folder.is_dir() for file in folder.glob("_native*") if file.name.endswith(endings)
    ][:1]


def _quietly(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Expected `{command[0]}` to succeed; got:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _in_the_child(tree: Path, tests: Sequence[str], answer: int, first_failure: bool) -> None:
    """Run pytest in the copy, write what it found, and end the process."""
    code = 1
    try:
        os.setsid()  # so that the whole group can be ended
        os.chdir(tree)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        sys.dont_write_bytecode = True
        os.environ |= {
            "PYTHONPATH": f"{tree / 'site'}{os.pathsep}{tree / 'src'}", "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        exec(_FIND_THE_COPY.format(source=str(tree / "src")))
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
        for name in [name for name in sys.modules if name.split(".")[0] == "mutants"]:
            del sys.modules[name]
        watch = _Watch()
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            *(["-x"] if first_failure else []),
        ]
        ended = pytest.main([*options, *tests], plugins=[watch])
        found = {"passed": watch.passed, "failed": watch.failed, "refused": watch.refused, "seconds": watch.seconds}
        if int(ended) not in (0, 1) and not watch.failed and not watch.refused:
            found["refused"] = f"pytest ended with {int(ended)}"
        with os.fdopen(answer, "w") as pipe:
            json.dump(found, pipe)
        code = 0
    except BaseException:  # whatever it was, this process ends here
        os.write(answer, json.dumps({"passed": 0, "failed": [], "refused": traceback.format_exc()[-1500:]}).encode())
    finally:
        os._exit(code)


class _Watch:
    """A plugin of pytest that keeps what passed and what failed."""

    def __init__(self):
        self.passed, self.failed, self.refused = 0, [], ""
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = round(self.seconds.get(report.nodeid, 0.0) + report.duration, 3)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed.append((report.nodeid, getattr(crash, "message", str(report.longrepr))[:200]))
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.refused = str(report.longrepr)[-1500:]


def _answer_of(child: int, pipe: int) -> dict[str, Any] | None:
    """Return what the child wrote; None if it ended without, or took too long and was ended."""
    os.set_blocking(pipe, False)
    began, text, ended = time.monotonic(), b"", False
    while not ended and time.monotonic() - began < MOST_SECONDS:
        ended = os.waitpid(child, os.WNOHANG)[0] == child
        try:
            while piece := os.read(pipe, 1 << 16):
                text += piece
        except BlockingIOError:
            pass
        time.sleep(0.02)
    if not ended:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(pipe)
    try:
        return json.loads(text)
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
      key, digest: of the mutant.
      outcome: `killed`, `survived`, or `invalid` if the tests could not even be collected.
      by: the first test that failed.
      why: the first line of its error, or why the mutant is invalid.
      seconds: that building and testing took.
    """

    key: str
    digest: str
    outcome: str
    by: str
    why: str
    seconds: float


def outcome_of(tree: Tree, mutant: Mutant) -> Outcome:
    """Plant a bug, run its tests, and take it out again."""
    began = time.monotonic()
    try:
        tree.plant(mutant)
        found = tree.run(mutant.tests, first_failure=True)
    finally:
        tree.restore(mutant)
    outcome, by, why = "survived", "", ""
    if found["failed"]:
        outcome, (by, why) = "killed", found["failed"][0]
    elif found["refused"] or not found["passed"]:
        outcome, why = "invalid", found["refused"] or "no test ran"
    first_line = why.strip().splitlines()[0] if outcome == "killed" and why.strip() else why
    first_line = first_line.replace(str(Path.home()), "$HOME")  # results are read elsewhere
    return Outcome(mutant.key, mutant.digest, outcome, by, first_line, round(time.monotonic() - began, 1))
