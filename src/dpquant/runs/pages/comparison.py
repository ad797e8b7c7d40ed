# SPDX-License-Identifier: Apache-2.0
"""A page that compares several runs. A pure function of their facts."""

from collections.abc import Sequence

from dpquant.runs.pages.facts import Facts
from dpquant.runs.pages.report import rendered, score_chart
from dpquant.runs.score import score_of


def comparison(facts: Sequence[Facts], *, together: str) -> str:
    """Return a page about several runs as HTML.

    Args:
      facts: of each run.
      together: what all runs cost together, in words.
    Privacy: post-processing of what the runs have released.
    """
    names = [f"{one.name} ({number})" if _is_double(one, facts) else one.name for number, one in enumerate(facts, 1)]
    return rendered(
        "comparison.html.jinja",
        title=f"Privacy report: {len(facts)} runs",
        embedded={"record_sha256": [one.record_sha256 for one in facts]},
        rows=[
            (name, one, score_of(one.record), score_chart(score_of(one.record)))
            for name, one in zip(names, facts, strict=True)
        ],
        together=together,
        same_data=len({one.record.dataset for one in facts}) == 1,
    )


def _is_double(one: Facts, facts: Sequence[Facts]) -> bool:
    return sum(other.name == one.name for other in facts) > 1
