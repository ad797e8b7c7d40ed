# SPDX-License-Identifier: Apache-2.0
"""The server of `dpquant watch`: one page about one run, for this machine alone.

How far a run is and how fast it goes is its operator's. So the server

- binds 127.0.0.1 and nothing else; from another machine the way is `ssh -L`;
- answers under one path only, which begins with a random token. Nothing in it names a file: no path of a request
  reaches the disk;
- refuses a Host that is not this machine, so that a page elsewhere whose name is made to point here (DNS rebinding)
  reads nothing;
- answers GET only, allows no other origin, and forbids the page every address but its own by a
  Content-Security-Policy with a fresh nonce.

The page gets its changes as server-sent events. A browser that lost the connection names the last event that it has
seen, and gets what has changed since.
"""

import hmac
import http
import json
import secrets
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, cast

from markupsafe import Markup

from dpquant.errors import SettingError
from dpquant.runs.alerts import alerts
from dpquant.runs.following import Following
from dpquant.runs.pages.watch import page, parts
from dpquant.runs.status import OVER

ADDRESS = "127.0.0.1"
_OWN_NAMES = frozenset({ADDRESS, "localhost", "[::1]"})  # the last is what ssh -L may listen on at its own end
_POLL = 1.0  # seconds between two looks at the directory
_PING = 15.0  # seconds after which a silent connection is tried
_LINGER = 60.0  # seconds without a request after the end was shown
_FIRST = 60.0  # seconds in which the state is read for the first time
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class News(NamedTuple):
    """What has changed on a page.

    Attributes:
      version: of the page.
      parts: {id: markup} of the parts that are new.
      over: nothing will change any more.
    """

    version: int
    parts: dict[str, Markup]
    over: bool


class Feed:
    """The newest parts of a page, for which any number of threads wait."""

    def __init__(self):
        self._parts: dict[str, tuple[int, Markup]] = {}
        self._version, self._over = 0, False
        self._changed = threading.Condition()

    def publish(self, found: Mapping[str, Markup], *, over: bool) -> None:
        """Take the parts of a page; those that differ from the ones before are news."""
        with self._changed:
            new = [name for name, html in found.items() if name not in self._parts or self._parts[name][1] != html]
            if new or over != self._over:
                self._version, self._over = self._version + 1, over
                self._parts.update({name: (self._version, found[name]) for name in new})
                self._changed.notify_all()

    def since(self, version: int, timeout: float) -> News:
        """Return what is newer than a version, once something is, the page is over, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version or self._over, timeout)
            newer = {name: html for name, (since, html) in self._parts.items() if since > version}
            return News(version=self._version, parts=newer, over=self._over)


class WatchServer(ThreadingHTTPServer):
    """Server of one page.

    Attributes:
      feed: the page.
      token: random, without which nothing is answered.
      shown: `time.monotonic` when the end of the run was last sent to somebody; None: not yet.
    """

    daemon_threads = True

    def __init__(self, port: int, feed: Feed):
        """Listen on 127.0.0.1.

        Args:
          port: 0 for any that is free.
          feed: the page.
        Raises:
          SettingError: the port is in use, or may not be used.
        """
        self.feed, self.token, self.shown = feed, secrets.token_urlsafe(24), None
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise SettingError(
                f"Expected port to be free; got port={port}: {error.strerror or error}. Another program listens there, "
                "or it is reserved. Leave it out for any free one."
            ) from error

    def server_bind(self) -> None:
        """Bind the port. The base class would also look up this machine's name, by the network if need be."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a browser that goes away is no error."""

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def note_shown(self, news: News) -> None:
        """Note that somebody was sent the end of the run, if it was the end."""
        if news.over:
            self.shown = time.monotonic()


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "dpquant", ""
    timeout = 30  # seconds that a request may take to arrive

    @property
    def _watch(self) -> WatchServer:
        return cast(WatchServer, self.server)

    def do_GET(self) -> None:
        """Answer the page or its events; everything else is refused."""
        home = f"/{self._watch.token}/"
        if not self._is_for_this_machine():
            self._refuse(http.HTTPStatus.MISDIRECTED_REQUEST)
        elif self._asks_for(home):
            self._page()
        elif self._asks_for(f"{home}events"):
            self._events()
        else:
            self._refuse(http.HTTPStatus.NOT_FOUND)

    def _other_method(self) -> None:
        if self._is_for_this_machine():
            self._refuse(http.HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            self._refuse(http.HTTPStatus.MISDIRECTED_REQUEST)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _other_method

    def _is_for_this_machine(self) -> bool:
        """Return whether the request names this machine, by whatever port: `ssh -L` may use another one."""
        hosts = self.headers.get_all("Host") or []
        name, colon, port = hosts[0].lower().rpartition(":") if len(hosts) == 1 else ("", "", "")
        if not colon or port.endswith("]"):
            name, port = f"{name}{colon}{port}", "80"
        return name in _OWN_NAMES and port.isascii() and port.isdigit()

    def _asks_for(self, path: str) -> bool:
        return hmac.compare_digest(self.path.encode("utf-8", "surrogateescape"), path.encode())

    def _page(self) -> None:
        nonce, news = secrets.token_urlsafe(16), self._watch.feed.since(0, _FIRST)
        if not news.parts:
            self._refuse(http.HTTPStatus.SERVICE_UNAVAILABLE)
            return
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        body = page(news.parts, nonce=nonce).encode()
        self._begin(http.HTTPStatus.OK, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(body)
        self._watch.note_shown(news)

    def _events(self) -> None:
        seen = self.headers.get("Last-Event-ID", "")
        version = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 12 else 0
        self._begin(http.HTTPStatus.OK, "text/event-stream")
        while True:
            news = self._watch.feed.since(version, _PING)
            text = f"id: {news.version}\ndata: {json.dumps(news.parts)}\n\n" if news.parts else ""
            text += "event: over\ndata: over\n\n" if news.over else ""
            text = text or ": still here\n\n"
            self.wfile.write(text.encode())
            version = news.version
            self._watch.note_shown(news)
            if news.over:
                return

    def _refuse(self, status: http.HTTPStatus) -> None:
        allowed = {"Allow": "GET"} if status == http.HTTPStatus.METHOD_NOT_ALLOWED else {}
        self._begin(status, "text/plain; charset=utf-8", allowed)
        if self.command != "HEAD":
            self.wfile.write(f"{status.value} {status.phrase}\n".encode())

    def _begin(self, status: http.HTTPStatus, kind: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line for each request would bury the address, and the address holds the token."""


def serve(
    following: Following,
    *,
    port: int,
    announce: Callable[[WatchServer], None],
    poll: float = _POLL,
    linger: float = _LINGER,
) -> None:
    """Serve the page of a run until the run is over and that was shown, or the process is interrupted.

    Args:
      following: the run.
      port: to listen on; 0 for any that is free.
      announce: called when the server listens.
      poll: seconds between two looks at the directory.
      linger: seconds without a request after which a page whose end was shown needs no server.
    Raises:
      SettingError: the port cannot be used, or something else lies in the run's place.
    """
    feed = Feed()
    with WatchServer(port, feed) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            announce(server)
            while server.shown is None or time.monotonic() < server.shown + linger:
                status = following.status()
                feed.publish(parts(status, alerts(status)), over=status.phase in OVER)
                time.sleep(poll)
        finally:
            server.shutdown()
