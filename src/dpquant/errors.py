# SPDX-License-Identifier: Apache-2.0
"""What dpquant raises. Every class is a DPQuantError and also the builtin that a caller would expect.

    DPQuantError
    ├── SettingError   (ValueError)    a setting is out of range, or settings contradict each other
    ├── FormatError    (ValueError)    a number format or recipe is unknown or cannot run on this backend
    ├── ModelError     (ValueError)    the model cannot be trained privately
    ├── DataError      (ValueError)    a data set is missing, empty or unreadable
    ├── BudgetError    (RuntimeError)  the planned privacy budget is spent, or cannot be met
    ├── DivergedError  (RuntimeError)  a run's parameters did not stay finite
    └── LedgerError    (RuntimeError)  the ledger cannot be written or does not agree with itself

Messages follow one form: `Expected <name> <rule>; got <name>=<value>. <Why it matters>. <What to do>.`
They name shapes, dtypes, module paths and settings, never data, nor the realised size of a Poisson batch.
"""


class DPQuantError(Exception):
    """The root of everything that dpquant raises on purpose."""


class SettingError(DPQuantError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class FormatError(DPQuantError, ValueError):
    """A number format or recipe is unknown, or cannot run on the chosen backend."""


class ModelError(DPQuantError, ValueError):
    """The model cannot be trained privately as it is."""


class DataError(DPQuantError, ValueError):
    """A data set is missing, empty or unreadable."""


class BudgetError(DPQuantError, RuntimeError):
    """The planned privacy budget is spent."""


class DivergedError(DPQuantError, RuntimeError):
    """A run's parameters did not stay finite. What was charged until then stays charged."""


class LedgerError(DPQuantError, RuntimeError):
    """The ledger cannot be written, or does not agree with itself."""
