# SPDX-License-Identifier: Apache-2.0
"""The page docs/mutations.md, made from the table and the results."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mutants.mutant import Mutant

_HEAD = """# Mutations

Each row is a bug of privacy or durability that `scripts/mutants` plants in a copy of the source, one at a time, and the
first test that fails because of it. The bugs are in `tests/mutants`, with the exact text that each changes; a test of
the suite checks that every one still applies. `scripts/mutants` writes this page; do not edit it.

{killed} of {total} planted bugs are killed: {python} are in Python and {native} in C++, in kernels that every x86
processor with AVX2 or AVX-512 VNNI runs.{left}

| kind | planted | killed |
|---|---|---|
{kinds}
"""


def page_of(mutants: Sequence[Mutant], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page in Markdown.

    Args:
      mutants: the table.
      results: {key of a mutant: its outcome}; a mutant without one was not run.
    """
    killed = Counter(one.kind for one in mutants if results.get(one.key, {}).get("outcome") == "killed")
    planted = Counter(one.kind for one in mutants)
    native = sum(one.native for one in mutants)
    left = [one.key for one in mutants if results.get(one.key, {}).get("outcome") != "killed"]
    head = _HEAD.format(
        killed=sum(killed.values()),
        total=len(mutants),
        python=len(mutants) - native,
        native=native,
        left=f" Not killed: {'; '.join(left)}." if left else "",
        kinds="\n".join(f"| {kind} | {planted[kind]} | {killed[kind]} |" for kind in sorted(planted)),
    )
    return head + "\n".join(_table(file, mutants, results) for file in dict.fromkeys(one.file for one in mutants))


def _table(file: str, mutants: Sequence[Mutant], results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"## {file}", "", "| planted | kind | killed by |", "|---|---|---|"]
    for one in mutants:
        if one.file == file:
            result = results.get(one.key, {})
            by = f"`{_short(result['by'])}`" if result.get("outcome") == "killed" else result.get("outcome", "not run")
            lines.append(f"| {one.name} | {one.kind} | {by} |")
    return "\n".join(lines) + "\n"


def _short(test: str) -> str:
    """Return a test's name without its parameters' values, which may hold anything."""
    return test.partition("[")[0].replace("|", "\\|")
