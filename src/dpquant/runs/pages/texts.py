# SPDX-License-Identifier: Apache-2.0
"""Texts about a run for other places: a model card, and a draft for OpenDP's Deployments Registry (tier 3)."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dpquant.privacy.plan import rounded_up
from dpquant.runs.pages.facts import Facts
from dpquant.runs.score import score_of

TODO = "TODO: only you know this"


def model_card(facts: Facts) -> str:
    """Return a model card as Markdown with a head of YAML, as model hubs read it."""
    record = facts.record
    said = {} if facts.redacted else record.declared or {}
    risk = "" if facts.meaning is None else f"\n\n{facts.meaning.told}"
    score = score_of(record)
    alarms = "".join(f"\n> **{_plain(alarm)}**\n" for alarm in facts.alarms())
    return f"""---
library_name: dpquant
tags:
- differential-privacy
- dpquant
metrics:
- {score.metric}
---

# {_plain(record.model)} trained on {_plain(record.dataset)} with differential privacy
{alarms}
{_plain(said.get("purpose", TODO))}

## Privacy

Epsilon = {rounded_up(record.epsilon)} at delta = {record.delta:g}; the unit is one record, added or removed.{risk}

```text
{record.statement.replace("```", "'''").strip()}
```

## Results

{score.title} {score.text(score.last, 2)} after {record.epochs} epochs. Test records are not covered by epsilon.

## How to use it

`dpquant.load("FOLDER")` gives a plain torch module, and `dpquant predict FOLDER FILE...` what it says of files;
`model.json` says how inputs are prepared. SHA-256 of the model: `{record.model_sha256 or "not recorded"}`.

Trained by dpquant {record.dpquant}: policy {record.policy}, format {record.format};
{record.quantized_fraction_macs:.0%} of the arithmetic ran in low precision.
"""


def registry_draft(facts: Facts) -> str:
    """Return a draft of an entry of the Deployments Registry as YAML; what only a person knows says TODO."""
    record, plan = facts.record, facts.record.plan
    said = {} if facts.redacted else record.declared or {}
    score = score_of(record)
    count = 0 if facts.events is None else sum(one.count for one in facts.events)
    meaning = "" if facts.meaning is None else f" {facts.meaning.told}"
    analyses = "" if plan is None or plan.analysis is None else " Layer scores by the same mechanism."
    begun = TODO if record.provenance is None else record.provenance.started[:10]
    details = f"Accountant: dp_accounting, privacy loss distributions, rounded up.{meaning}"
    draft = {
        "url_slug": _slug(f"{record.dataset}-{record.model}"),
        "deployment": {
            "basic": {
                "name": f"{record.model} trained on {record.dataset}",
                "data_curators": [{"data_curator_name": said.get("curator", TODO), "data_curator_type": TODO}],
                "description": f"A neural network trained with dpquant {record.dpquant}.",
                "intended_use": said.get("purpose", TODO),
                "data_product_type": "Machine learning model",
                "data_product_region": said.get("region", TODO),
                "data_product_sector": TODO,
                "publication_date": begun,
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"Labelled records; {TODO}",
                "unprotected_quantities": "Test accuracy, measured on held-out records; the numbers that were taken as "
                "public.",
            },
            "privacy_loss": {
                "privacy_unit": "One record, added or removed",
                "privacy_unit_details": _unit(facts),
                "number_of_privacy_units": 1,
                "privacy_parameters": {"epsilon": _up(record.epsilon), "delta": record.delta},
                "privacy_parameters_details": details,
            },
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": said.get("custodian", TODO),
                "trust_assumptions": "Whoever runs the training sees the raw records.",
                "actors": said.get("custodian", TODO),
                "release_type": "One-time release" if not said.get("release") else TODO,
                "release_type_details": said.get("release", TODO),
                "data_source_type": "Static",
                "data_source_type_details": "",
                "access_type": "Non-interactive",
                "access_type_details": "",
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": said.get("tuning", TODO),
                "mechanisms": f"Poisson-subsampled Gaussian (DP-SGD), {count} releases, sample rate "
                f"{record.sample_rate:.6g}, noise multiplier {record.noise_multiplier:.6g}, clipping norm "
                f"{record.max_grad_norm:g}.{analyses}",
                "composition": "All releases together, by privacy loss distributions.",
                "post_processing": "The choice of quantized layers follows from noised scores.",
                "justification": said.get("justification", TODO),
                "utility": f"{score.title} {score.text(score.last, 2)}.",
                "additional_information": record.statement,
            },
            "administrative": {"status": "Draft", "registry_authors": [TODO], "tier": 3},
        },
    }
    return "# A draft: read it, complete what says TODO, and check it against the registry's own schema.\n" + _yaml(
        draft
    )


def _unit(facts: Facts) -> str:
    if facts.records_per_person is not None:
        most = facts.records_per_person
        found = next((epsilon for records, epsilon in facts.persons() if records == most), "not known")
        return f"A person has at most {most} records, declared; epsilon of a person: {found}."
    return f"How many records a person has is not declared. {TODO}"


def _up(epsilon: float) -> float | str:
    text = rounded_up(epsilon)
    return text if text == "infinity" else float(text)


def _yaml(value: Any, indent: int = 0) -> str:
    """Return nested mappings, lists and scalars as YAML; a text is a JSON string, which YAML reads as it is."""
    pad = "  " * indent
    lines = []
    for name, one in value.items():
        if isinstance(one, Mapping):
            lines.append(f"{pad}{name}:\n{_yaml(one, indent + 1)}")
        elif isinstance(one, list):
            items = [
                f"{pad}  -\n{_yaml(item, indent + 2)}" if isinstance(item, Mapping) else f"{pad}  - {_scalar(item)}\n"
                for item in one
            ]
            lines.append(f"{pad}{name}:\n{''.join(items)}")
        else:
            lines.append(f"{pad}{name}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as a text
    return json.dumps(value, ensure_ascii=True)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80] or "run"


def _plain(text: str) -> str:
    """Return a text in one line that neither Markdown nor HTML takes for more."""
    return re.sub(r"([\\\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
