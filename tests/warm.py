# SPDX-License-Identifier: Apache-2.0
"""A process that has loaded what `dpquant` loads, and forks for every command, which saves seconds each.

python tests/warm.py SOCKET CLIENT    listens on SOCKET until its standard input ends; writes CLIENT, a program that is
                                      used as `dpquant` is
"""

import array
import gc
import importlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

LOADED = (
    "dpquant.cli",
    "dpquant.app.predict",
    "dpquant.app.report",
    "dpquant.app.spent",
    "dpquant.app.verify",
    "dpquant.data.tables",
    "dpquant.data.texts",
    "dpquant.privacy.accounting",
    "dpquant.privacy.meaning",
    "dpquant.runs.evaluation",
    "dpquant.runs.train",
    "tokenizers",
    "torch._dynamo",
)
_CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(call).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(call)
sys.exit(server.recv(1)[0])
"""


def serve(address: str, client: Path) -> None:
    """Fork for every command that the client sends, with the client's folder, environment and standard streams."""
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()  # else every fork looks through all of it

    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    while True:
        called, _ = server.accept()
        if os.fork() == 0:  # who waits for the command does so in a process of its own
            _answer(called)
        called.close()


def _answer(called: socket.socket) -> None:
    size, ancillary, _, _ = called.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i", ancillary[0][2])
    arguments, folder, environment = json.loads(called.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["dpquant", *arguments]
        sys.path[0] = ""
        from dpquant.cli import main

        main()
    _, status = os.waitpid(child, 0)
    called.send(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    serve(sys.argv[1], Path(sys.argv[2]))
