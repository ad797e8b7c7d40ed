# SPDX-License-Identifier: Apache-2.0
"""Drafts a file of settings: all of them in groups, commented out, with default, origin and meaning. Loads no torch.

A line that is left as a comment keeps its default, so that the draft by itself is the run that was asked for.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dpquant.runs.declared import QUESTIONS
from dpquant.runs.defaults import Default, defaults
from dpquant.runs.effects import has_effect
from dpquant.runs.settings import TrainSettings
from dpquant.runs.toml import toml_of

_HEAD = """# Settings of dpquant train. Take the # off a line to change it.
# dpquant plan --config FILE says what they cost. All of them are public, and none may follow from the records.
"""
_WIDTH = 110
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Data: what is trained on": ("data", "data_dir", "records", "image_size", "normalize", "augment", "views"),
    "Network": ("model", "width", "fix"),
    "Privacy: what is promised": (
        *("epsilon", "delta", "noise_multiplier", "noise", "max_grad_norm", "records_per_person"),
        *("batch_size", "sample_rate", "epochs"),
    ),
    "Training": ("optimizer", "lr", "momentum", "weight_decay", "lr_schedule", "average"),
    "Low precision": ("format", "policy", "fraction", "macs", "layers", "beta", "ema", "rest"),
    "Analyses, by which policies prioritise and dpquant choose layers": (
        *("analysis_every", "analysis_score", "analysis_batch_size", "analysis_noise_multiplier"),
        *("analysis_max_norm", "analysis_repeats"),
    ),
    "This machine: no effect on what is promised": (
        *("backend", "device", "threads", "workers", "partition", "microbatch_size", "memory", "choices"),
        *("exact_sums", "shard_optimizer", "checkpoint_every", "seed"),
    ),
    "Trackers: where else a run's numbers are shown": ("track", "track_model", "track_unsafe"),
    "For research alone": ("unsafe_metrics",),
}
_OTHERS = "Tables, texts, and other data and networks"


def drafted(given: Mapping[str, Any]) -> str:
    """Return a file of settings in which those that are given are set, and all others are comments.

    Raises:
      DPQuantError: what is given is no run.
    """
    settings, usual = TrainSettings.chosen(given), defaults(given)
    lines = [_HEAD]
    for group, names in _groups():
        lines += [f"# ---- {group}", ""]
        for name in names:
            lines += _lines(name, given, settings, usual)
    lines += ["# ---- Your own words, for the report", "", "[declared]"]
    for name, question in QUESTIONS.items():
        lines += [f"# {question}", f'# {name} = ""']
    return "\n".join(lines) + "\n"


def _groups() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each group with its settings; those of no group come last."""
    known = {name for names in GROUPS.values() for name in names}
    yield from GROUPS.items()
    options = (field.name for field in dataclasses.fields(TrainSettings) if field.metadata["option"])
    yield _OTHERS, tuple(name for name in options if name not in known)


def _lines(name: str, given: Mapping[str, Any], settings: TrainSettings, usual: Mapping[str, Default]) -> list[str]:
    """Return a setting's meaning, its line and a blank one."""
    field = next(one for one in dataclasses.fields(TrainSettings) if one.name == name)
    help, _, note = field.metadata["help"].partition(" [")
    lines = textwrap.wrap(help, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    value = getattr(settings, name)
    if given.get(name) is not None:
        return [*lines, f"{name} = {toml_of(value)}", ""]
    if not has_effect(name, vars(settings)):
        return [*lines, f"# {name} has no effect with these settings", ""]
    if value is None:
        return [*lines, f"# {name} =    # not set" + (f": {note.rstrip(']')}" if note else ""), ""]
    origin = usual[name].origin if name in usual else "general"
    return [*lines, f"# {name} = {toml_of(value)}    # {origin}", ""]
