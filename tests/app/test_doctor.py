# SPDX-License-Identifier: Apache-2.0
"""`dpquant doctor` says what is there, names no user, and asks nobody."""

import contextlib
import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from dpquant.app.cli import run as command
from dpquant.app.doctor import Health, shortened
from dpquant.native import SLOWER
from dpquant.version import version

_asked: list[str] = []
_watching = [False]


def _audit(event, arguments):
    if _watching[0] and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        _asked.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def asking_nobody():
    """Context: an attempt to reach another machine is an error at its end. The hook itself cannot be removed."""
    _asked.clear()
    _watching[0] = True
    try:
        yield
    finally:
        _watching[0] = False
    assert _asked == []


@pytest.fixture(scope="module")
def health():
    with asking_nobody():
        return Health.here()


def test_one_that_asks_somebody_would_be_seen():
    with pytest.raises(AssertionError), asking_nobody(), contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", 80)


def test_it_tells_what_is_there(health, capsys):
    rows = dict(health.rows)
    assert rows["dpquant"] == version() and rows["torch"] == health.versions["torch"] and health.cores >= 1
    assert health.backend in rows["backend"] and health.backend_reason in rows["backend"]
    assert health.memory_gib > health.memory_free_gib > 0 and health.disk_free_gib > 0
    assert health.extras.keys() == {"text", "arrow", "onnx", "bench", "tensorboard", "mlflow"}
    assert rows["cache"] == "off"  # tests keep none
    assert command(["doctor"]) == 0
    told = capsys.readouterr().out
    first, *block = told.splitlines()
    assert first == "```" == block[block.index("```")] and "network        never used" in told


def test_its_json_has_the_fields_that_its_help_names(health, capsys):
    assert command(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {*(field.name for field in dataclasses.fields(Health)), "advice"}
    assert command(["doctor", "--help"]) == 0
    help = capsys.readouterr().out
    assert all(name in help for name in found)


def test_what_could_be_better_comes_with_what_to_do(health):
    lacking = dataclasses.replace(
        health, native=False, native_obstacle="no compiler", disk_free_gib=0.5, memory_free_gib=0.5,
        extras={"text": False, "arrow": True}, memory_gib=None, devices=["cuda:0 (H200)"],
    )  # fmt: skip
    advice = "\n".join(lacking.advice)
    for words in ("C++ compiler", "0.5 GiB are free", "--memory", "pip install 'dpquant[text]'"):
        assert words in advice, words
    rows = dict(lacking.rows)
    assert rows["native module"] == f"{SLOWER} (no compiler)" and rows["extras"] == "arrow; missing: text"
    assert rows["GPU"] == "cuda:0 (H200)" and rows["memory"].startswith("not known")
    well = dataclasses.replace(lacking, native=True, disk_free_gib=9.0, memory_free_gib=None, extras={"text": True})
    assert well.advice == []


def test_no_host_and_no_user_is_named(health):
    told = health.to_json() + str(health.rows)
    assert os.uname().nodename not in told and str(Path.home()) not in told
    assert shortened(Path.home() / "x") == "~/x" and shortened(Path("/x")) == "/x"
