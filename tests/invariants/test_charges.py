# SPDX-License-Identifier: Apache-2.0
"""T9: the ledger of a run says, line by line, what its mechanism did: as it is used from the command line."""

import collections
import json

import pytest

from doubles import Dies
from dpquant.privacy import accounting
from dpquant.privacy.ledger import Ledger
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train
from mechanisms import starting, with_doubles

SMALL = {
    "backend": "simulate", "microbatch_size": 64, "sample_rate": 0.25, "batch_size": 40.0, "epochs": 1, "width": 0.5,
}  # fmt: skip
ANALYSED = {"analysis_every": 1, "analysis_batch_size": 4.0}
CONFIGS = {
    "full precision": {"policy": "none"},
    "analyses": {"policy": "dpquant", **ANALYSED},
    "accumulation": {"policy": "rotate", "microbatch_size": 8},
    "given noise": {"policy": "none", "noise_multiplier": 1.7, "max_grad_norm": 0.3, "optimizer": "adam"},
    "resumed": {"policy": "prioritise", **ANALYSED, "epochs": 2},
}


class Seen:
    """The calls of a run's mechanism, in all of its processes."""

    def __init__(self):
        self.charges, self.draws, self.noises = [], [], []

    def mechanism(self, honest):
        def charge(call, **event):
            call(**event)
            self.charges.append((event["kind"], event["sample_rate"], event["noise_multiplier"]))

        def draw(call, num_records, rate, **purpose):
            self.draws.append((purpose["stream"], rate))
            return call(num_records, rate, **purpose)

        def gaussian(call, shape, std, **purpose):
            self.noises.append((purpose["stream"], purpose["step"], purpose["name"], std))
            return call(shape, std, **purpose)

        return with_doubles(honest, charge=charge, draw=draw, gaussian=gaussian)


def ran(config, out, seen, change=lambda mechanism: mechanism):
    """The record of a run with these settings; of the resumed one, the first process is killed in its second epoch."""
    settings = TrainSettings.chosen({**SMALL, **CONFIGS[config]})
    start = starting(lambda mechanism: change(seen.mechanism(mechanism)))
    if config == "resumed":
        with pytest.raises(Dies.Killed):
            train(settings, out, start=start, sinks=[Dies(6)])
    return train(settings, out, start=start, resume=config == "resumed"), settings


def assert_ledger_tells_all(record, settings, out, seen):
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["kind"] in ("train", "analysis")]
    assert all(line["count"] == 1 and not line["research"] for line in events)
    told = [(line["kind"], line["sample_rate"], line["noise_multiplier"]) for line in events]
    assert told == seen.charges and [event[:2] for event in told] == seen.draws
    norms = {"train": settings.max_grad_norm, "analysis": 1.0}  # of impacts measured by gradients
    noised = collections.Counter((kind, step) for kind, step, *_ in seen.noises)
    assert len(noised) == len(events) and len(seen.noises) == len({noise[:3] for noise in seen.noises})
    sigmas = {kind: sigma for kind, _, sigma in told}
    assert all(std == pytest.approx(sigmas[kind] * norms[kind]) for kind, _, _, std in seen.noises)
    parameters = {name for kind, _, name, _ in seen.noises if kind == "train"}
    assert {count for (kind, _), count in noised.items() if kind == "train"} == {len(parameters)}
    assert record.epsilon == accounting.epsilon(Ledger.read(out / "ledger.jsonl"), record.delta)
    assert record.steps == sum(kind == "train" for kind, *_ in told)


@pytest.mark.always
@pytest.mark.parametrize("config", CONFIGS)
def test_the_ledger_is_what_the_mechanism_did(config, tmp_path):
    seen = Seen()
    record, settings = ran(config, tmp_path / "run", seen)
    assert_ledger_tells_all(record, settings, tmp_path / "run", seen)
    assert any(kind == "analysis" for kind, *_ in seen.charges) == (
        CONFIGS[config]["policy"] in ("dpquant", "prioritise")
    )


def without_analyses(mechanism):
    def charge(honest, **event):
        if event["kind"] == "train":
            honest(**event)

    return with_doubles(mechanism, charge=charge)


def drawing_twice(mechanism):
    def draw(honest, *arguments, **purpose):
        honest(*arguments, **purpose)
        return honest(*arguments, **purpose)

    return with_doubles(mechanism, draw=draw)


def with_noise_of_half_the_norm(mechanism):
    return with_doubles(mechanism, gaussian=lambda honest, shape, std, **k: honest(shape, std / 2, **k))


@pytest.mark.parametrize("planted", [without_analyses, drawing_twice, with_noise_of_half_the_norm])
def test_a_ledger_that_tells_something_else_is_seen(planted, tmp_path):
    seen = Seen()
    record, settings = ran("analyses", tmp_path / "run", seen, planted)
    with pytest.raises(AssertionError):
        assert_ledger_tells_all(record, settings, tmp_path / "run", seen)
