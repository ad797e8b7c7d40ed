# SPDX-License-Identifier: Apache-2.0
"""How settings fit each other: which contradict each other, and which have no effect beside the others.

A setting without effect is refused where the user gives it.

Momentum beside Adam, or options of analyses beside a policy that makes none, would otherwise be ignored silently.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpquant.data.sizes import OWN_PREFIXES, PACKED_PREFIX, PUBLIC_SIZES, TABLE_PREFIX, TEXT_PREFIX
from dpquant.errors import SettingError
from dpquant.formats import AUTO

SCORED = ("prioritise", "dpquant")
"""Policies that choose by measured impacts, and so need analyses."""
_IN_MEMORY = "digits"  # comes with scikit-learn

# {setting: (the setting that decides, whether its value gives an effect, why it gives none)}
_Rule = tuple[str, Callable[[Any], bool], str]
_WITH_SHARE: _Rule = ("policy", lambda x: x not in ("none", "all"), "The policy quantizes no share but none or all")
_WITH_ANALYSIS: _Rule = ("policy", lambda x: x in SCORED, "The policy makes no analysis")
_OF_FILES: _Rule = ("data", lambda x: x.startswith((TABLE_PREFIX, TEXT_PREFIX)), "Only tables and texts have it")
_OF_TABLES: _Rule = ("data", lambda x: x.startswith(TABLE_PREFIX), "Only tables have it")
_OF_TEXTS: _Rule = ("data", lambda x: x.startswith(TEXT_PREFIX), "Only texts have it")
_OF_TRACKERS: _Rule = ("track", lambda x: x is not None, "There is no tracker")
_RULES: Mapping[str, _Rule] = {
    "test": _OF_FILES,
    "test_share": _OF_FILES,
    "label_column": _OF_FILES,
    "spec": _OF_TABLES,
    "text_column": _OF_TEXTS,
    "classes": _OF_TEXTS,
    "tokenizer": _OF_TEXTS,
    "max_length": _OF_TEXTS,
    "image_size": (
        "data",
        lambda x: not x.startswith((TABLE_PREFIX, TEXT_PREFIX, PACKED_PREFIX)),
        "Tables and texts are no images, and packed images have their size",
    ),
    "normalize": (
        "data",
        lambda x: not x.startswith((TABLE_PREFIX, TEXT_PREFIX, PACKED_PREFIX)),
        "Tables and texts are no images, and packed images have theirs",
    ),
    "augment": ("data", lambda x: not x.startswith((TABLE_PREFIX, TEXT_PREFIX)), "Only images have views"),
    "views": ("augment", lambda x: x != "none", "All views of an image would be the same"),
    "workers": ("data", lambda x: x.startswith(PACKED_PREFIX), "Records in memory are not read ahead"),
    "lora": ("model", lambda x: x.startswith("hf:"), "Only pretrained networks of texts have adapters"),
    "momentum": ("optimizer", lambda x: x == "sgd", "The optimizer has no such setting"),
    "track_model": _OF_TRACKERS,
    "track_unsafe": _OF_TRACKERS,
    "fraction": _WITH_SHARE,
    "macs": _WITH_SHARE,
    "format": ("policy", lambda x: x != "none", "The policy quantizes no layer; rest is the format of all others"),
    "beta": ("policy", lambda x: x == "dpquant", "The policy does not draw by impacts"),
    "ema": _WITH_ANALYSIS,
    "analysis_every": _WITH_ANALYSIS,
    "analysis_score": _WITH_ANALYSIS,
    "analysis_batch_size": _WITH_ANALYSIS,
    "analysis_noise_multiplier": _WITH_ANALYSIS,
    "analysis_max_norm": _WITH_ANALYSIS,
    "analysis_repeats": _WITH_ANALYSIS,
    "records": ("data", lambda x: x not in PUBLIC_SIZES, "How many training records it has is public already"),
    "data_dir": (
        "data",
        lambda x: x != _IN_MEMORY and not x.startswith(OWN_PREFIXES),
        "The data set is not looked for in a folder of data sets",
    ),
}
_DEVIATIONS = 8  # a batch that is larger by so many standard deviations is never drawn
_ALWAYS_ALLOWED = 64  # copies that cost little
_INSTEAD = (
    ("epsilon", "noise_multiplier"),
    ("fraction", "macs"),
    ("fraction", "layers"),
    ("macs", "layers"),
    ("sample_rate", "records"),
    ("microbatch_size", "memory"),
    ("test", "test_share"),
    ("lora", "train_only"),
)


def settings_of_policies() -> frozenset[str]:
    """Return the names of the settings that choose or shape a policy, and so rule `format=auto` out as the default."""
    shaped = {name for name, (decider, _, _) in _RULES.items() if decider == "policy"} - {"format"}
    return frozenset({"policy", "layers", "rest"} | shaped)


def check_contradictions(values: Mapping[str, Any]) -> None:
    """Refuse values of settings that contradict each other.

    Raises:
      SettingError: names two of them.
    """
    for first, second in _INSTEAD:
        if values[first] is not None and values[second] is not None:
            raise SettingError(
                f"Expected one of {first} and {second}; got {first}={values[first]} and {second}={values[second]}. "
                "They contradict each other. Give one."
            )
    size, batch = values["microbatch_size"], values["batch_size"]
    largest = max(math.ceil(batch + _DEVIATIONS * math.sqrt(batch)), _ALWAYS_ALLOWED)
    if size is not None and size > largest:
        raise SettingError(
            f"Expected microbatch_size <= {largest}, as no Poisson batch of batch_size={batch:g} is larger; got "
            f"microbatch_size={size}. It would be filled up with copies of a record, which cost time. Leave it out, or "
            "give a smaller one."
        )
    if values["format"] == AUTO:
        _check_auto(values)
    if values["partition"] == "range":
        _check_range(values)
    if values["layers"] is not None and values["policy"] != "static":
        raise SettingError(
            f"Expected policy=static with layers; got policy={values['policy']}. Other policies choose for "
            "themselves. Leave layers out."
        )


def _check_range(values: Mapping[str, Any]) -> None:
    """Refuse what needs records of all machines on each, or has the same ones everywhere."""
    if not values["data"].startswith(OWN_PREFIXES):
        raise SettingError(
            f"Expected data of your own with partition=range; got data={values['data']}. Published records are the "
            "same on every machine, so that each would be drawn several times. Leave partition out."
        )
    if values["exact_sums"]:
        raise SettingError(
            "Expected partition=even with exact_sums; got partition=range. Exact sums deal whole microbatches of a "
            "batch out to the processes, which then need each other's records. Leave one of them out."
        )


def _check_auto(values: Mapping[str, Any]) -> None:
    """Refuse what `auto` decides itself: which layers run quantized, and in which precision the others do."""
    if values["policy"] not in ("all", "none"):
        raise SettingError(
            f"Expected policy=all with format=auto; got policy={values['policy']}. auto quantizes the layers that get "
            "faster, by measurement, in a format that costs no accuracy; no choice is left. Leave policy out, or give "
            "a format, as luq-fp4."
        )
    if values["rest"] != "full":
        raise SettingError(
            f"Expected rest=full with format=auto; got rest={values['rest']}. Layers that do not get faster stay in "
            "full precision. Leave rest out, or give a format, as luq-fp4."
        )


def has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a setting has an effect beside the values of all settings."""
    if name not in _RULES:
        return True
    decider, holds, _ = _RULES[name]
    return holds(values[decider])


def decider(name: str) -> tuple[str, str] | None:
    """Return the setting on which it depends whether this one has an effect, and why it may have none.

    None: it always has one.
    """
    return (_RULES[name][0], _RULES[name][2]) if name in _RULES else None


def check_effects(given: Mapping[str, Any], file: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse what was given without effect.

    Args:
      given: settings that the user gave one by one.
      file: settings that a file of settings gave. One without effect is accepted where it has its default value, or
        where the setting that takes its effect away was given against the file.
      values: all settings with their defaults, before `given` and `file`.
    Raises:
      SettingError: names the setting, the one that decides, and why.
    """
    final = {**values, **file, **given}
    for name, (decider, holds, why) in _RULES.items():
        if holds(final[decider]):
            continue
        by_file = file.get(name) and decider not in given and file[name] != values.get(name)
        if given.get(name) or by_file:  # zero momentum is none, whatever the optimizer
            raise SettingError(
                f"Expected no {name} with {decider}={final[decider]}; got {name}={final[name]}. {why}, so that it "
                "would be ignored. Leave it out."
            )
