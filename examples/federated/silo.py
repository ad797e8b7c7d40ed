# SPDX-License-Identifier: Apache-2.0
"""A silo's private run, which is put down after each round and taken up for the next one, maybe by another process.

    HOME/ledger.jsonl      every charge of every round: one ledger, which ends the run when the plan is spent
    HOME/steps-00000020/   what a process needs to go on: the optimizer's state and the place in the plan
    HOME/statement.txt     what the silo promises its records

Nothing here knows Flower. Only noised weights leave a silo, so that neither the server nor the other silos need trust.
"""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from study import STUDY, Study, network, per_example_loss
from torch import Tensor
from torch.utils.data import Dataset

import dpquant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What a silo releases in a round.

    Attributes:
      weights: {name: tensor} after its steps.
      steps: that it took. Fewer than planned once the plan is spent, or after a crash.
      epsilon: spent by now, at the plan's delta.
    """

    weights: dict[str, Tensor]
    steps: int
    epsilon: float


def take_round(home: Path, records: Dataset, weights: Mapping[str, Tensor], study: Study = STUDY) -> Round:
    """Take a round's steps from the server's weights.

    Args:
      home: folder of the silo's run, which is made in the first round.
      records: of the silo, private.
      weights: of the server; whatever they are, the silo's promise holds.
      study: of all silos.
    Raises:
      DPQuantError: the weights are of another network, or the ledger is in use or not as it was written.
    Privacy: charges each step to the ledger before its records are read. Returns and writes released values only.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=study.lr, momentum=study.momentum)
    private = dpquant.make_private(
        model,
        optimizer,
        records,
        loss_fn=per_example_loss,
        plan=study.plan,
        policy=dpquant.AllPolicy(),
        format="int8",
        ledger=home / "ledger.jsonl",
        microbatch_size=64,
        resume=True,
    )
    with contextlib.closing(private):
        before = sorted(home.glob("steps-????????"))
        if before:
            private.load(before[-1])
        private.replace_weights(weights)
        began = private.steps_taken
        with contextlib.closing(batches(private)) as drawn:
            for batch in itertools.islice(drawn, study.local_steps):
                private.step(batch)
        if private.steps_taken > began:
            private.save(home / f"steps-{private.steps_taken:08d}")
            for folder in before:
                shutil.rmtree(folder)
        (home / "statement.txt").write_text(statement(private, study))
        return Round(
            weights={name: tensor.clone() for name, tensor in private.model.state_dict().items()},
            steps=private.steps_taken - began,
            epsilon=private.epsilon_spent(),
        )


def batches(private: dpquant.PrivateTraining) -> Iterator:
    """Yield the batches of all epochs that are left of a run's plan."""
    for epoch in private.epochs():
        yield from epoch


def statement(private: dpquant.PrivateTraining, study: Study) -> str:
    """Return what a silo promises its records, in words."""
    return (
        f"{private.statement()}\n"
        f"The silo has taken {private.steps_taken} of the {private.plan.steps} steps of {study.rounds} rounds. The "
        "promise is to its own records, for all rounds together, and holds against the server and the other silos, "
        "whatever they send. No amplification by choosing silos is claimed. Somebody with records in several silos "
        "adds up what each of them has spent.\n"
    )
