# SPDX-License-Identifier: Apache-2.0
"""The user's own words about a run, from the table [declared] of its settings: what no program can know.

They are public, are kept with the record and stand in the report beside what was measured. Nothing follows from them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dpquant.errors import SettingError, did_you_mean, kind_of

QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "curator": "Who answers for the data and for this release?",
        "purpose": "What is the model for?",
        "tuning": "Which other runs, looks at the data or pre-processing came before, and do they count?",
        "pretraining": "Which pre-trained weights were used, trained on what, with which overlap?",
        "custodian": "Who held the raw data, and where did the run take place?",
        "release": "Is this one release or one of many, and when does the budget renew?",
        "justification": "Why this epsilon?",
        "region": "Whose people are these, in which region and sector?",
    }
)
_LONGEST = 2000  # characters of an answer


def checked(words: Any) -> dict[str, str]:
    """Return the user's words, without empty ones.

    Args:
      words: {name of a question: answer}.
    Raises:
      SettingError: they are no such table, a name is unknown, or an answer is no text or too long.
    """
    if not isinstance(words, Mapping):
        raise SettingError(
            f"Expected declared to be a table of texts; got {kind_of(words)}. It holds your words for the report. "
            "Write them as lines NAME = TEXT below [declared]."
        )
    for name, answer in words.items():
        if name not in QUESTIONS:
            raise SettingError(
                f"Expected names among {', '.join(QUESTIONS)} in [declared]; got {name}. It would stand nowhere in the "
                f"report. {did_you_mean(name, QUESTIONS)}Use one of these."
            )
        if not isinstance(answer, str) or len(answer) > _LONGEST:
            found = f"{len(answer)} characters" if isinstance(answer, str) else kind_of(answer)
            raise SettingError(
                f"Expected declared.{name} to be a text of at most {_LONGEST} characters; got {found}. It stands in "
                "the report. Shorten it, or write it in quotes."
            )
    return {name: words[name].strip() for name in QUESTIONS if words.get(name, "").strip()}
