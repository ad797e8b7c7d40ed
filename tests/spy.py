# SPDX-License-Identifier: Apache-2.0
"""A network spy, for a process of its own: whatever looks up a name or connects to another machine is noted, and fails.

python spy.py train ...     runs dpquant's command line; exit code 97 if anything tried to reach another machine
"""

import os
import socket
import sys

CAUGHT = 97
_LOOPBACK = ("127.0.0.1", "::1", "localhost", None, "")
_reached = []


def _refuse(what, place):
    _reached.append(f"{what} {place!r}")
    raise OSError(f"the spy allows no {what} {place!r}")


def _looking_up(name):
    own = getattr(socket, name)

    def looks_up(place, *rest, **named):
        host = place[0] if isinstance(place, tuple) else place
        return own(place, *rest, **named) if host in _LOOPBACK else _refuse(name, place)

    return looks_up


def _connecting(name):
    own = getattr(socket.socket, name)

    def connects(self, *rest):
        address = rest[-1]
        here = self.family == socket.AF_UNIX or address[0] in _LOOPBACK
        return own(self, *rest) if here else _refuse(name, address)

    return connects


def install():
    """Replace the lookups and the connections of Python's sockets."""
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
        setattr(socket, name, _looking_up(name))
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, _connecting(name))


def main():
    """Run the command line under the spy."""
    install()
    from dpquant.app.cli import run

    code = run(sys.argv[1:])
    sys.stdout.flush()
    for one in _reached:
        print(f"spy: {one}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(CAUGHT if _reached else code)  # no thread that another package left behind is waited for


if __name__ == "__main__":
    main()
