# SPDX-License-Identifier: Apache-2.0
"""`dpquant watch`: what its server refuses, what it tells and when it ends; the terminal; a run in another process."""

import contextlib
import dataclasses
import http.client
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from markupsafe import Markup
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
from test_alerts import WELL, epochs

from dpquant.app.cli import run as command
from dpquant.app.terminal import follow, line, sparkline, to_json, view
from dpquant.app.watch import Feed, WatchServer, serve
from dpquant.errors import SettingError
from dpquant.runs.alerts import alerts
from dpquant.runs.following import Following
from dpquant.runs.names import PROGRESS, RECORD
from dpquant.runs.pages.watch import parts
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train

SETTINGS = {
    "model": "mlp", "width": 0.1, "epochs": 2, "batch_size": 256.0, "backend": "simulate", "microbatch_size": 64,
    "noise_multiplier": 1.0, "lr": 0.1, "policy": "rotate",
}  # fmt: skip
STATUS = dataclasses.replace(WELL, per_epoch=epochs(0.5, 0.9, layers=["a"]), curve=[1.0, 4.0, 8.0])


@contextlib.contextmanager
def serving(feed):
    """A server of a feed, in a thread."""
    with WatchServer(0, feed) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def server():
    feed = Feed()
    feed.publish(parts(STATUS, alerts(STATUS)), over=False)
    with serving(feed) as found:
        yield found


def answer(server, path, *, method="GET", hosts=("127.0.0.1",)):
    """Status, headers and body of a request with these Host headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    found = connection.getresponse()
    try:
        return found.status, found.headers, found.read().decode()
    finally:
        connection.close()


# What is refused


def home(server):
    return f"/{server.token}/"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:80", "127.0.0.1:65535", "[::1]:9", "[::1]"])
def test_this_machine_may_read_the_page_by_whatever_port(host, server):
    status, headers, body = answer(server, home(server), hosts=[host])
    assert status == 200 and "cnn on digits" in body and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "hosts",
    [
        *(["evil.example"], ["evil.example:80"], ["127.0.0.1.evil.example"], ["localhost.evil.example:80"], [""]),
        *(["localhost:evil"], ["evil.example:127.0.0.1"], ["localhost:"], ["10.0.0.1"], ["[::2]"], []),
        *(["127.0.0.1", "evil.example"], ["localhost", "localhost"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_name_for_this_machine_is_refused(method, hosts, server):
    status, _, body = answer(server, home(server), method=method, hosts=hosts)
    assert status == 421 and "digits" not in body and server.token not in body


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(method, server):
    status, headers, body = answer(server, home(server), method=method)
    assert status == 405 and headers["Allow"] == "GET" and "digits" not in body
    assert answer(server, home(server), method="BREW")[0] == 501


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/events", "/index.html", "/x/", "/{token}", "/{token}/record.json", "/{token}/../{token}/"),
        *("/{token}/%2e%2e/", "/{token}/events/", "/{token}/?x=1", "/{token}//", "/{half}/", "/{token}x/", "/{upper}/"),
        *("http://127.0.0.1/{token}/", "/../../etc/passwd", "/é/"),
    ],
)
def test_another_path_is_not_found(path, server):
    token = server.token
    named = path.format(token=token, half=token[:16], upper=token.swapcase()).encode("latin-1").decode("latin-1")
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as sent:
        sent.sendall(f"GET {named} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode("latin-1"))
        told = b"".join(iter(lambda: sent.recv(4096), b""))
    assert told.startswith(b"HTTP/1.0 404 ") and b"digits" not in told and token.encode() not in told


def test_it_listens_on_this_machine_alone_and_each_server_has_its_own_token(server):
    assert server.socket.getsockname()[0] == "127.0.0.1" and server.socket.family == socket.AF_INET
    with serving(Feed()) as other:
        assert other.token != server.token and len(other.token) == 32
        assert answer(other, home(server))[0] == 404


def test_the_page_may_ask_nobody_but_its_server_and_runs_no_script_but_its_own(server):
    status, headers, body = answer(server, home(server))
    policy = dict(one.strip().split(" ", 1) for one in headers["Content-Security-Policy"].split(";"))
    nonce = re.fullmatch(r"'nonce-([\w-]{22})'", policy["script-src"])[1]
    assert policy == {
        "default-src": "'none'", "script-src": f"'nonce-{nonce}'", "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert (
        status == 200 and "Access-Control-Allow-Origin" not in headers and headers["Referrer-Policy"] == "no-referrer"
    )
    assert body.count(f'nonce="{nonce}"') == 2 and not re.search(r"(src|href)\s*=\s*[\"'](?!#)|https?://| on\w+=", body)
    assert nonce not in answer(server, home(server))[1]["Content-Security-Policy"]


def test_texts_of_a_run_are_no_markup():
    hostile = "<img src=x onerror=alert(1)>"
    status = dataclasses.replace(
        STATUS, name=hostile, model=hostile, dataset=hostile, layers=[hostile], trouble=hostile,
        per_epoch=epochs(0.5, layers=[hostile], scores={hostile: 0.1}),
    )  # fmt: skip
    found = parts(status, alerts(status))
    assert "<img" not in "".join(found.values()) and "&lt;img" in found["head"] + found["alerts"]


# Events


class Events:
    """A listener to the events of a server."""

    def __init__(self, server, last=None):
        self._socket = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
        resumes = "" if last is None else f"Last-Event-ID: {last}\r\n"
        self._socket.sendall(f"GET {home(server)}events HTTP/1.0\r\nHost: localhost\r\n{resumes}\r\n".encode())
        self._file = self._socket.makefile("r")
        head = "".join(iter(self._file.readline, "\n"))
        assert "200 OK" in head and "text/event-stream" in head

    def next(self):
        """The next event: its fields, or {} at the end."""
        lines = itertools.takewhile(lambda line: line.strip(), iter(self._file.readline, ""))
        return dict(line.rstrip("\n").split(": ", 1) for line in lines)

    def close(self):
        self._file.close()
        self._socket.close()


def test_events_tell_what_has_changed_and_a_browser_that_comes_back_what_it_has_missed():
    feed = Feed()
    feed.publish({"head": Markup("a"), "map": Markup("b")}, over=False)
    with serving(feed) as server:
        first, second = Events(server), Events(server, last=1)
        event = first.next()
        assert (event["id"], json.loads(event["data"])) == ("1", {"head": "a", "map": "b"})
        feed.publish({"head": Markup("a"), "map": Markup("c\n")}, over=False)
        for listener in (first, second):
            event = listener.next()
            assert (event["id"], json.loads(event["data"])) == ("2", {"map": "c\n"})
        feed.publish({"head": Markup("d"), "map": Markup("c\n")}, over=False)
        late = Events(server, last=1)
        assert json.loads(late.next()["data"]) == {"head": "d", "map": "c\n"}
        assert first.next()["id"] == "3"  # before there is a fourth, which would take its place
        assert server.shown is None
        feed.publish({"head": Markup("d"), "map": Markup("c\n")}, over=True)
        assert first.next()["event"] == "over"
        assert first.next() == {}  # the server notes that the end was shown once it is sent, and then hangs up
        assert server.shown is not None
        for one in (first, second, late):
            one.close()


def test_the_same_page_is_no_news():
    feed = Feed()
    feed.publish({"head": Markup("a")}, over=False)
    feed.publish({"head": Markup("a")}, over=False)
    assert feed.since(0, 0.0).version == 1 and feed.since(1, 0.0).parts == {}


@pytest.mark.parametrize("last", ["x", "-1", "9" * 40, "\uff11"])
def test_an_odd_last_event_is_as_none(last, server):
    listener = Events(server, last=last)
    assert json.loads(listener.next()["data"])["title"] == "50% cnn on digits"
    listener.close()


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    train(TrainSettings.chosen(SETTINGS), out)
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy that was stopped after its last epoch."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / RECORD).unlink()
    return out


def test_a_server_ends_when_the_run_is_over_and_that_was_shown(finished):
    bodies = []

    def visit(server):
        threading.Thread(target=lambda: bodies.append(answer(server, home(server))[2]), daemon=True).start()

    serve(Following(finished), port=0, announce=visit, poll=0.05, linger=0.2)
    assert "finished" in bodies[0] and "mlp on digits" in bodies[0]


def test_a_port_in_use_is_one_line(finished, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command(["watch", str(finished), "--port", str(port)]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.count("\n") == 1
        and f"Expected port to be free; got port={port}" in captured.err
    )


def test_once_prints_the_state_and_exit_code_3_is_an_alert(finished, stopped, capsys):
    assert command(["watch", str(finished), "--once"]) in (0, 3)  # two epochs may well guess
    assert "mlp on digits  finished" in capsys.readouterr().out
    assert command(["watch", str(stopped), "--once"]) == 3
    assert "ALERT  The run has stopped without a record: charged 12 of 12 steps" in " ".join(
        capsys.readouterr().out.split(" ")
    )


def test_the_json_of_once_has_the_fields_that_its_help_names(stopped, capsys):
    assert command(["watch", str(stopped), "--once", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["phase"], found["step"], found["steps"], found["epoch"]) == ("stopped", 12, 12, 2)
    assert found["alerts"][0]["kind"] == "stopped" and found["alerts"][0]["grave"] is True
    assert command(["watch", "--help"]) == 0
    help = capsys.readouterr().out
    assert all(name in help for name in [*found, *found["alerts"][0]])


def test_numbers_that_are_not_finite_are_null_in_json():
    status = dataclasses.replace(STATUS, epsilon=float("inf"))
    assert json.loads(to_json(status, [])) | {"epsilon": None} == json.loads(to_json(status, []))


def console(**given):
    return Console(file=io.StringIO(), width=100, **given)


class Later:
    """States of a run, one after the other."""

    def __init__(self, *states):
        self._states = list(states)

    def status(self):
        return self._states.pop(0)


STATES = (
    dataclasses.replace(STATUS, phase="starting", step=0, per_epoch=[], charged=0),
    *(dataclasses.replace(STATUS, per_epoch=STATUS.per_epoch[:1]),) * 2,
    dataclasses.replace(STATUS, unsafe_metrics=True),
    dataclasses.replace(STATUS, phase="finished", step=200, unsafe_metrics=True),
)


def test_a_pipe_gets_a_line_for_each_epoch_phase_and_alert(capsys):
    follow(Later(*STATES), console(), sleep=lambda seconds: None)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/one: starting, epoch 0 of 10, step 0 of 200")
    assert [one.split(",")[0] for one in lines if not one.startswith("alert")] == [
        *("runs/one: running",) * 2, "runs/one: finished",
    ]  # fmt: skip
    assert sum(one.startswith("alert: Training accuracy") for one in lines) == 2  # when it came, and at the end


def test_a_terminal_shows_it_in_place_and_ends_with_the_run(capsys):
    shown = console(force_terminal=True)
    follow(Later(*STATES), shown, sleep=lambda seconds: None)
    assert "200 of 200" in shown.file.getvalue() and "▁█" in shown.file.getvalue()


def test_the_view_has_bars_accuracy_pace_and_alerts():
    shown = console()
    status = dataclasses.replace(
        STATUS, pace=dataclasses.replace(STATUS.pace, examples_per_second=1234.0, seconds_left=70)
    )
    shown.print(view(status, alerts(dataclasses.replace(status, unsafe_metrics=True))))
    text = " ".join(shown.file.getvalue().split())
    for words in (
        "100 of 200",
        "5.00 of 8.00",
        "90.0%, best 90.0%",
        "1 min 10 s left, 1,234 examples/s",
        "ALERT Training",
    ):
        assert words in text, words
    assert "1 s ago" in line(status) + text


def test_a_terminal_without_such_characters_gets_others():
    assert sparkline([0.1, 0.5, 0.9], ascii_only=True) == "_=#" and sparkline([0.5]) == "▁"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    shown = Console(file=stream, width=80)
    shown.print(view(STATUS, [], ascii_only=shown.options.ascii_only))
    stream.flush()


@pytest.mark.parametrize("options", [["--terminal"], []], ids=["terminal", "page"])
def test_ctrl_c_ends_it_quietly(options, tmp_path):
    """A run that is not there yet is waited for, and said to be."""
    watching = subprocess.Popen(
        [sys.executable, "-m", "dpquant", "watch", str(tmp_path / "run"), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    said = watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=30)
    assert (watching.returncode, errors) == (130, "") and ("waiting" in said or "not there yet" in said)


def test_a_run_in_another_process_is_followed_to_its_end(tmp_path, capsys):
    out = tmp_path / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "dpquant", "train", *options, "--out", str(out), "--no-report"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    ) as training:  # fmt: skip
        follow(Following(out), console(), poll=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert training.returncode == 0 and json.loads((out / PROGRESS).read_text())["running"] is False
    assert lines[0] == "run: waiting for the run to begin" and any("run: starting" in one for one in lines)
    assert any(one.startswith("run: finished, epoch 2 of 2, step 12 of 12") for one in lines)


def test_what_becomes_something_else_is_refused(stopped):
    following = Following(stopped)
    assert following.status().phase == "stopped"
    (stopped / "config.toml").unlink()
    with pytest.raises(SettingError, match="Expected the directory of a run"):
        following.status()
