# SPDX-License-Identifier: Apache-2.0
"""Trackers as another package would offer them, by the entry points in the folder beside this file."""

import socket

from dpquant import Sink

MADE = []
"""Every tracker of `theirs`, the newest last."""


class Theirs(Sink):
    """Keeps what it is made from, what it is told, and the times that it gets for it."""

    def __init__(self, run):
        self.run, self.told, self.times, self.closed = run, _Told(), [], False
        MADE.append(self)

    def started(self, plan, settings):
        self._keep("started", (plan, settings))

    def stepped(self, progress):
        self.told.all.append(("stepped", progress))

    def epoch_ended(self, epoch):
        self._keep("epoch_ended", epoch)

    def finished(self, record):
        self._keep("finished", record)

    def close(self):
        self.closed = True

    def _keep(self, method, what):
        self.told.all.append((method, what))
        self.times.append(self.run.now())


class _Told:
    def __init__(self):
        self.all = []

    def of(self, method):
        return [what for name, what in self.all if name == method]


class Failing(Sink):
    """Fails in the method that its entry point names, every time."""

    def __init__(self, run):
        method = run.folder.name.removeprefix("failing-")
        if method == "init":
            _fail()
        setattr(self, method, _fail)


def _fail(*what):
    raise ConnectionError("no route to the tracker")


class Asking(Sink):
    """Looks up a name."""

    def __init__(self, run):
        pass

    def epoch_ended(self, epoch):
        socket.getaddrinfo("tracker.example", 443)


class Stopping(Sink):
    """The user's Ctrl-C in the second epoch of the first process."""

    def __init__(self, run):
        self._stops = not any(run.folder.iterdir())
        (run.folder / "seen").touch()

    def stepped(self, progress):
        if self._stops and progress.epoch == 1:
            raise KeyboardInterrupt


NUMBER = 3
