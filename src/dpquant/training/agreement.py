# SPDX-License-Identifier: Apache-2.0
"""What fails on one process fails on all, so that none waits for an exchange that another never comes to."""

import json
from collections.abc import Callable
from typing import TypeVar

from dpquant import errors
from dpquant.errors import DPQuantError, ModelError
from dpquant.training.distributed import Group

Result = TypeVar("Result")

_DONE, _FAILED = b"+", b"-"


def together(group: Group, work: Callable[[], Result]) -> Result:
    """Do this process' part of some work, in which nothing is exchanged, and return its result.

    Raises: what the work raises here; else the error of the first process where it raises, without a foreign
      exception's text, which may quote a record.
    """
    if group.size == 1:
        return work()
    try:
        result = work()
    except Exception as error:
        group.from_all(told(error))
        raise
    for rank, answer in enumerate(group.from_all(b"")):
        if answer:
            raise heard(answer, f"process {rank}")
    return result


def on_first(group: Group, work: Callable[[], bytes]) -> bytes:
    """Let process 0 do some work, in which nothing is exchanged, and return its result on every process.

    Raises: on every process, what the work raises.
    """
    if group.rank > 0:
        answer = group.from_first(b"")
        if answer[:1] == _FAILED:
            raise heard(answer[1:], "process 0")
        return answer[1:]
    try:
        result = work()
    except Exception as error:
        group.from_first(_FAILED + told(error))
        raise
    group.from_first(_DONE + result)
    return result


def first_reason(group: Group, work: Callable[[], str]) -> str:
    """Do this process' part of some work that returns a text; return that of the first process that has one, or "".

    Raises: as `together`.
    """
    own = together(group, work)
    return next((text.decode() for text in group.from_all(own.encode()) if text), "")


def told(error: Exception) -> bytes:
    """Return an error as bytes for other processes; of a foreign one, its type alone."""
    ours = isinstance(error, DPQuantError)
    known = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), ModelError)
    return json.dumps([known.__name__, str(error) if ours else "", type(error).__name__]).encode()


def heard(answer: bytes, where: str) -> DPQuantError:
    """Return the error that another process has told."""
    name, text, foreign = json.loads(answer)
    if text:
        return vars(errors)[name](text)
    return ModelError(
        f"Expected every process of the run to do its part; got a {foreign} on {where}. All stop, because the others "
        "cannot go on without it. See the output of that process."
    )
