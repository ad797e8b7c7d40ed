# SPDX-License-Identifier: Apache-2.0
"""What a text stands for, a table's field or an option: a number, or a date. Loads no torch.

A text that is neither raises nothing, whatever it is: which record holds it is private.
"""

import datetime
import math

_EPOCH = datetime.datetime(1970, 1, 1)
_DAY = datetime.timedelta(days=1)


def number_of(text: str) -> float | None:
    """Return a text as a finite number; None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def days_of(text: str) -> float | None:
    """Return a date in ISO 8601, with or without a time, as days since 1970-01-01; None if it is none.

    A time with a zone is taken to UTC, one without as it stands.
    """
    try:
        when = datetime.datetime.fromisoformat(text)
        if when.tzinfo is not None:
            when = when.astimezone(datetime.UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):  # a zone may lead out of the years 1 to 9999
        return None
    return (when - _EPOCH) / _DAY
