# SPDX-License-Identifier: Apache-2.0
"""The example of federated silos: one ledger over all rounds, whichever process takes them, and nothing else goes out.

The tests of the silo itself need no Flower. Those of the Flower client run where flwr is installed, which needs an
environment of its own: `scripts/federated` makes one.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpquant
from dpquant.errors import DataError
from dpquant.privacy import accounting

EXAMPLE = Path(__file__).parents[1] / "examples" / "federated"
needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="flwr needs an environment of its own: scripts/federated"
)


@pytest.fixture
def example(monkeypatch):
    """Modules of the example, by name."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module


@pytest.fixture
def short(example):
    """A study of three rounds of two steps."""
    return dataclasses.replace(example("study").STUDY, rounds=3, local_steps=2)


def averaged(many):
    return {name: torch.stack([one[name] for one in many]).mean(dim=0) for name in many[0]}


def spent(home, delta):
    """Steps, processes and epsilon that a silo's ledger holds; each hash is verified."""
    contents = dpquant.Ledger.verify(home / "ledger.jsonl")
    steps = sum(event.count for event in contents.events)
    return steps, contents.attempts, accounting.epsilon(contents.events, delta)


# The silo


def with_one_ledger(silo, home, *rest):
    return silo.take_round(home, *rest)


def with_a_new_run_each_round(silo, home, *rest):
    """What an engine that is made anew in every round does."""
    (home / "ledger.jsonl").unlink(missing_ok=True)
    for folder in home.glob("steps-*"):
        folder.rename(home / f"former-{folder.name}")
    return silo.take_round(home, *rest)


def assert_one_promise_for_all_rounds(example, study, folder, take):
    """Two silos, averaged by hand: each reports what all of its rounds cost, and after the last none is left."""
    silo, task = example("silo"), example("study")
    weights = task.network().state_dict()
    for number in range(1, study.rounds + 1):
        rounds = [take(silo, folder / str(k), task.records_of(k, 2), weights, study) for k in range(2)]
        assert [one.steps for one in rounds] == [study.local_steps] * 2
        assert all(
            one.epsilon == pytest.approx(study.plan.epsilon_spent(steps=number * study.local_steps, analyses=0))
            for one in rounds
        )
        assert any(not torch.equal(rounds[0].weights[name], rounds[1].weights[name]) for name in weights)
        weights = averaged([one.weights for one in rounds])
    last = take(silo, folder / "0", task.records_of(0, 2), weights, study)
    assert last.steps == 0 and all(torch.equal(last.weights[name], weights[name]) for name in weights)
    steps, processes, epsilon = spent(folder / "0", study.delta)
    assert (steps, processes) == (study.plan.steps, study.rounds + 1) and epsilon <= study.epsilon
    promise = (folder / "0" / "statement.txt").read_text()
    assert f"has taken {steps} of the {steps} steps" in promise and "DOES NOT HOLD" not in promise


def test_a_silo_makes_one_promise_for_all_rounds(example, short, tmp_path):
    assert_one_promise_for_all_rounds(example, short, tmp_path, with_one_ledger)


def test_one_that_counts_each_round_alone_would_be_seen(example, short, tmp_path):
    with pytest.raises(AssertionError):
        assert_one_promise_for_all_rounds(example, short, tmp_path, with_a_new_run_each_round)


KILLED = """
import dataclasses, os, sys
from pathlib import Path
from torch.utils.data import Dataset
import dpquant, silo, study

home = Path(sys.argv[1])

class Kills(Dataset):
    '''The machine goes down while the first step reads its records.'''

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if (home / "ledger.jsonl").exists() and dpquant.Ledger.read(home / "ledger.jsonl"):
            os._exit(9)
        return self.records[index]

short = dataclasses.replace(study.STUDY, rounds=3, local_steps=2)
silo.take_round(home, Kills(study.records_of(0, 2)), study.network().state_dict(), short)
"""


def test_what_a_killed_process_has_charged_stays_charged(example, short, tmp_path):
    silo, task = example("silo"), example("study")
    path = os.pathsep.join([str(EXAMPLE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    lost, _, _ = spent(tmp_path, short.delta)
    assert done.returncode == 9 and lost >= 1
    weights, taken = task.network().state_dict(), 0
    while (one := silo.take_round(tmp_path, task.records_of(0, 2), weights, short)).steps:
        weights, taken = one.weights, taken + one.steps
    assert taken == short.plan.steps - lost, "what was lost is not taken again"
    assert spent(tmp_path, short.delta)[0] == short.plan.steps and one.epsilon <= short.epsilon


def test_weights_of_another_network_are_refused_before_anything_is_charged(example, short, tmp_path):
    silo, task = example("silo"), example("study")
    with pytest.raises(DataError, match="got some in which it is absent"):
        silo.take_round(tmp_path, task.records_of(0, 2), {}, short)
    assert spent(tmp_path, short.delta)[0] == 0


def test_the_silos_and_the_server_share_no_record(example):
    task = example("study")
    found = [set(task.records_of(number, 3).indices) for number in range(3)]
    assert sum(map(len, found)) == len(set().union(*found)) == 1797 - len(task.public_test_set()[1])


def test_the_recorded_simulation_kept_its_promise(example):
    """The committed record of a whole study, by Flower's simulation: its figures follow from its ledgers' counts."""
    record, study = json.loads((EXAMPLE / "study.json").read_text()), example("study").STUDY
    assert record["study"] == vars(study) and len(record["course"]) == study.rounds
    for one in record["silos"]:
        assert one["steps"] == study.plan.steps and one["processes"] == study.rounds
        assert one["epsilon"] == pytest.approx(study.plan.epsilon_spent(steps=one["steps"], analyses=0))
        assert one["epsilon"] <= study.epsilon
    assert record["course"][-1]["accuracy_test"] > record["course"][0]["accuracy_test"]


# The Flower client


def message_and_context(example, number, silos, weights):
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as a server's process has them
    content = RecordDict({"arrays": ArrayRecord(weights), "config": ConfigRecord({"server-round": 1})})
    context = Context(
        run_id=1,
        node_id=number,
        node_config={"partition-id": number, "num-partitions": silos},
        state=RecordDict(),
        run_config={},
    )
    return Message(content, dst_node_id=number, message_type="train"), context


def assert_only_what_is_public_goes_out(reply, study, steps):
    """Weights of the network's names, and three numbers; the number of records is the agreed one."""
    assert set(reply.content) == {"arrays", "metrics"}
    told = dict(reply.content["metrics"])
    epsilon = study.plan.epsilon_spent(steps=steps, analyses=0)
    assert told == {"num-examples": study.records, "steps": study.local_steps, "epsilon": pytest.approx(epsilon)}


@needs_flower
def test_flowers_client_is_called_twice_and_its_average_is_ours(example, tmp_path, monkeypatch):
    client, task, server = example("client"), example("study"), example("server")
    monkeypatch.setenv(client.HOME, str(tmp_path))
    strategy, weights = server.strategy(), task.network().state_dict()
    for number in (1, 2):
        replies = []
        for silo in range(2):
            reply = client.app(*message_and_context(example, silo, 2, weights))
            assert_only_what_is_public_goes_out(reply, task.STUDY, number * task.STUDY.local_steps)
            replies.append(reply)
        ours = averaged([reply.content["arrays"].to_torch_state_dict() for reply in replies])
        arrays, told = strategy.aggregate_train(number, replies)
        theirs = arrays.to_torch_state_dict()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
        assert told["steps"] == task.STUDY.local_steps
        weights = theirs
    steps, processes, _ = spent(tmp_path / "silo-1", task.STUDY.delta)
    assert (steps, processes) == (2 * task.STUDY.local_steps, 2)
    reply.content["metrics"]["loss"] = 0.5
    with pytest.raises(AssertionError):
        assert_only_what_is_public_goes_out(reply, task.STUDY, steps)


def assert_an_error_says_nothing(handle, message, context):
    with pytest.raises(Exception) as found:
        handle(message, context)
    assert "secret" not in str(found.value) and found.value.__cause__ is None and found.value.__context__ is None


def fails(message, context):
    raise ValueError("could not read the secret record")


@needs_flower
def test_an_exception_that_may_quote_a_record_does_not_reach_the_server(example):
    client = example("client")
    given = message_and_context(example, 0, 2, {})
    assert_an_error_says_nothing(client.without_details(fails), *given)
    with pytest.raises(AssertionError):
        assert_an_error_says_nothing(fails, *given)
    with pytest.raises(DataError, match="Expected values of this model"):
        client.app(*given)
