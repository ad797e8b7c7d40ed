# SPDX-License-Identifier: Apache-2.0
"""Differentially private training with dynamic quantization (DPQuant).

A public name imports its module when it is first used, so that `import dpquant` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpquant.app.check_model import check_model
    from dpquant.audits.report import AuditRequest, audit
    from dpquant.backends.qtensor import QTensor
    from dpquant.backends.quantize import quantize
    from dpquant.data.form import Form
    from dpquant.engine.clip import clipped_sum
    from dpquant.engine.convert import fix, restore
    from dpquant.engine.layers import prepare, quantizable_layers, set_policy
    from dpquant.errors import (
        BudgetError,
        DataError,
        DivergedError,
        DPQuantError,
        FormatError,
        LedgerError,
        ModelError,
        SettingError,
    )
    from dpquant.formats import Precision, Recipe
    from dpquant.privacy.analysis_plan import AnalysisPlan
    from dpquant.privacy.events import Event
    from dpquant.privacy.ledger import Ledger
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.loading import load
    from dpquant.runs.record import RunRecord
    from dpquant.runs.sinks import Sink
    from dpquant.training.policies import (
        AllPolicy,
        DPQuantPolicy,
        NonePolicy,
        PrioritisePolicy,
        RotatePolicy,
        StaticPolicy,
    )
    from dpquant.training.private import PrivateTraining
    from dpquant.training.start import make_private

_HOMES = {
    "AllPolicy": "training.policies",
    "AnalysisPlan": "privacy.analysis_plan",
    "AuditRequest": "audits.report",
    "BudgetError": "errors",
    "DPQuantError": "errors",
    "DPQuantPolicy": "training.policies",
    "DataError": "errors",
    "DivergedError": "errors",
    "Event": "privacy.events",
    "Form": "data.form",
    "FormatError": "errors",
    "Ledger": "privacy.ledger",
    "LedgerError": "errors",
    "ModelError": "errors",
    "NonePolicy": "training.policies",
    "Precision": "formats",
    "PrioritisePolicy": "training.policies",
    "PrivacyPlan": "privacy.plan",
    "PrivateTraining": "training.private",
    "QTensor": "backends.qtensor",
    "Recipe": "formats",
    "RotatePolicy": "training.policies",
    "RunRecord": "runs.record",
    "SettingError": "errors",
    "Sink": "runs.sinks",
    "StaticPolicy": "training.policies",
    "audit": "audits.report",
    "check_model": "app.check_model",
    "clipped_sum": "engine.clip",
    "fix": "engine.convert",
    "load": "runs.loading",
    "make_private": "training.start",
    "prepare": "engine.layers",
    "quantizable_layers": "engine.layers",
    "quantize": "backends.quantize",
    "restore": "engine.convert",
    "set_policy": "engine.layers",
}

__all__ = [
    "AllPolicy",
    "AnalysisPlan",
    "AuditRequest",
    "BudgetError",
    "DPQuantError",
    "DPQuantPolicy",
    "DataError",
    "DivergedError",
    "Event",
    "Form",
    "FormatError",
    "Ledger",
    "LedgerError",
    "ModelError",
    "NonePolicy",
    "Precision",
    "PrioritisePolicy",
    "PrivacyPlan",
    "PrivateTraining",
    "QTensor",
    "Recipe",
    "RotatePolicy",
    "RunRecord",
    "SettingError",
    "Sink",
    "StaticPolicy",
    "audit",
    "check_model",
    "clipped_sum",
    "fix",
    "load",
    "make_private",
    "prepare",
    "quantizable_layers",
    "quantize",
    "restore",
    "set_policy",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("dpquant.version").version()
    if name not in _HOMES:
        raise AttributeError(f"module 'dpquant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpquant.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
