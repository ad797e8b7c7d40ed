# SPDX-License-Identifier: Apache-2.0
"""`dpquant explain WORD`: words, settings and verbs in about ten lines each. Loads no torch.

The texts are in `explanations/`. What the settings say themselves, help, range and default, is taken from them, and a
verb's text is its help, so that nothing is said twice.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpquant.errors import SettingError, did_you_mean
from dpquant.runs.defaults import BY_DATA, GENERAL
from dpquant.runs.effects import decider
from dpquant.runs.ranges import RANGES
from dpquant.runs.settings import TrainSettings

_TEXTS = Path(__file__).parent / "explanations"
_FOR_PROGRAMS = ("With --json", "With --once --json")  # paragraphs of a verb's help that describe fields
_HEADING = re.compile(r"^## (.+)\n", re.MULTILINE)
_ALSO = {
    "exit code": "exit codes", "dp": "privacy", "sigma": "noise_multiplier", "learning rate": "lr",
    "learning_rate": "lr", "clip": "clipping", "sampling": "poisson sampling", "budget": "epsilon", "score": "impact",
    "batch norm": "batchnorm", "freeze": "batchnorm", "pretraining": "pretrained", "fine tuning": "pretrained",
    "normalization": "normalize", "normalisation": "normalize", "imagenet": "normalize",
    "progress.json": "heartbeat", "quantize": "quantization", "pld": "accountant", "baseline": "none",
}  # fmt: skip
"""{what users may ask for: the word that explains it}."""


@functools.cache
def texts(name: str) -> Mapping[str, str]:
    """Return the sections of a file of explanations: {word: text}."""
    _, *parts = _HEADING.split((_TEXTS / f"{name}.md").read_text(encoding="utf-8"))
    return {word: text.strip() for word, text in zip(parts[::2], parts[1::2], strict=True)}


def settings() -> dict[str, dataclasses.Field[Any]]:
    """Return every setting of `dpquant train` by its name."""
    return {field.name: field for field in dataclasses.fields(TrainSettings)}


def explained(word: str, verbs: Mapping[str, str]) -> str:
    """Return the explanation of a word as Markdown.

    Args:
      word: a word, a setting or a verb; case, hyphens and underscores make no difference.
      verbs: {name: help} of the command line.
    Raises:
      SettingError: nothing explains it. The message names the nearest word.
    """
    known = {_spelt(one): one for one in words(verbs)} | {_spelt(one): meant for one, meant in _ALSO.items()}
    name = known.get(_spelt(word))
    if name is None:
        hint = did_you_mean(word, words(verbs), _ALSO)
        raise SettingError(f"Expected a word that is explained; got {word}. {hint}dpquant explain lists all words.")
    parts = [part for part in (texts("terms").get(name), texts("settings").get(name)) if part]
    if name in settings():
        parts.append(facts(settings()[name]))
    if name in verbs:
        told = [one for one in inspect.cleandoc(verbs[name]).split("\n\n") if not one.startswith(_FOR_PROGRAMS)]
        parts += [f"dpquant {name}: {told[0]}", *told[1:], f"Options: dpquant {name} --help"]
    return "\n\n".join([f"**{name}**", *parts]) + "\n"


def words(verbs: Mapping[str, str]) -> list[str]:
    """Return everything that is explained, in the order of the alphabet."""
    return sorted({*texts("terms"), *texts("settings"), *settings(), *verbs})


def facts(field: dataclasses.Field[Any]) -> str:
    """Return what a setting says of itself: help, range, default and where that comes from."""
    option = f"--{field.name.replace('_', '-')}" if field.metadata["option"] else f"[{field.name}]"
    lines = [f"- **{option}**: {field.metadata['help']}"]
    if field.name in RANGES:
        lines.append(f"- allowed: {RANGES[field.name][0]}")
    if default := default_of(field):
        lines.append(f"- default: {default}")
    if rule := decider(field.name):
        setting, why = rule
        lines.append(f"- depends on {setting}, and is refused where it would be ignored: {why[0].lower()}{why[1:]}")
    return "\n".join(lines)


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a setting's default and where it comes from; "" where its help says it, or there is none."""
    if field.default is not None:
        return _shown(field.default)
    by_data = {name: values[field.name] for name, values in BY_DATA.items() if field.name in values}
    general = [_shown(GENERAL[field.name])] if field.name in GENERAL else []
    known = [f"{_shown(value)} for {name.rstrip(':')}" for name, value in by_data.items()]
    return "; ".join([*general, *known])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spelt(word: str) -> str:
    return re.sub(r"[-_ ]", "", word.removeprefix("--").lower())
