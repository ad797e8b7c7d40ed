# SPDX-License-Identifier: Apache-2.0
"""Doubles of what a run is given: parts of a mechanism that watch or change each call, and runs begun with them."""

import dataclasses

import torch

import dpquant
from dpquant.engine.clip import ClippedSum
from dpquant.formats import precision
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.training.execution import ExecutionRequest
from dpquant.training.impact import ImpactSum
from dpquant.training.private import PrivateTraining
from dpquant.training.start import Request, begin


@dataclasses.dataclass
class Drawn:
    """A sampler whose draws go through `change(honest, num_records, sample_rate, **purpose)`."""

    inner: object
    change: object

    @property
    def secure(self):
        return self.inner.secure

    def draw(self, *arguments, **purpose):
        return self.change(self.inner.draw, *arguments, **purpose)


@dataclasses.dataclass
class Noised:
    """Noise that goes through `change(honest, shape, std, **purpose)`; discrete noise without std."""

    inner: object
    change: object

    @property
    def secure(self):
        return self.inner.secure

    def gaussian(self, *arguments, **purpose):
        return self.change(self.inner.gaussian, *arguments, **purpose)

    def discrete(self, *arguments, **purpose):
        return self.change(self.inner.discrete, *arguments, **purpose)


@dataclasses.dataclass
class Charged:
    """A ledger whose charges go through `change(honest, **event)`, and its events through `told(events)`."""

    inner: object
    change: object = None
    told: object = None

    @property
    def research(self):
        return self.inner.research

    @property
    def head(self):
        return self.inner.head

    def charge(self, **event):
        return self.inner.charge(**event) if self.change is None else self.change(self.inner.charge, **event)

    def events(self):
        return self.inner.events() if self.told is None else self.told(self.inner.events())

    def charged(self, kind):
        return self.inner.charged(kind)

    def settle(self):
        self.inner.settle()

    def close(self):
        self.inner.close()


def with_doubles(mechanism, *, draw=None, gaussian=None, charge=None, events=None) -> Mechanism:
    """The mechanism with calls of its parts changed."""
    parts = {}
    if draw is not None:
        parts["sampler"] = Drawn(mechanism.sampler, draw)
    if gaussian is not None:
        parts["noise"] = Noised(mechanism.noise, gaussian)
    if charge is not None or events is not None:
        parts["ledger"] = Charged(mechanism.ledger, charge, events)
    return dataclasses.replace(mechanism, **parts)


def begun(
    model, records, *, loss_fn, plan, policy, mechanism=None, lr=0.1, optimizer=torch.optim.SGD, group=None,
    make_run=PrivateTraining, microbatch_size=None, format="luq-fp4", backend="auto", seed=0,
    workers=1, exact_sums=False, shard_optimizer=False, make_mechanism=None, partition="even", example=None,
):  # fmt: skip
    """A run as `make_private` begins it, with a mechanism, a group or a kind of run of one's own."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    request = Request(
        model=model, optimizer=optimizer(trainable, lr=lr), train_set=records, loss_fn=loss_fn, plan=plan,
        policy=policy, seed=seed, workers=workers, shard_optimizer=shard_optimizer, partition=partition,
        example=example,
        execution=ExecutionRequest(
            chosen=dpquant.formats.precision(format), backend=backend, microbatch_size=microbatch_size,
            exact_sums=exact_sums,
        ),
    )  # fmt: skip
    made = make_mechanism or (lambda: mechanism or Mechanism.secret(None))
    return begin(request, lambda seconds: made(), group=group, make_run=make_run)


def starting(change, make_run=PrivateTraining):
    """What starts a run for `train`: as `make_private`, with the mechanism that `change` makes of a secret one.

    Every step is a line of the ledger, because no time of a step is given to it.
    """

    def start(
        model, optimizer, train_set, *, plan, ledger, format, rest, backend, microbatch_size, memory, resume,
        exact_sums=False, **keywords,
    ):  # fmt: skip
        wanted = ExecutionRequest(
            chosen=precision(format), rest=precision(rest), backend=backend, microbatch_size=microbatch_size,
            memory=memory, exact_sums=exact_sums,
        )  # fmt: skip
        request = Request(
            model=model, optimizer=optimizer, train_set=train_set, plan=plan, execution=wanted, **keywords
        )
        opened = Ledger.resumed if resume and ledger.exists() else Ledger
        return begin(
            request, lambda seconds: change(Mechanism.secret(opened(ledger, budget=plan.budget()))), make_run=make_run
        )

    return start


def finish(run):
    """The run after all of its steps."""
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
    return run


def repeating(mechanism_seed=0, *, make_run=PrivateTraining, **changed):
    """A `start` of runs, with the arguments of `make_private`: draws from a seed, and calls of parts changed."""

    def start(
        model, optimizer, records, *, loss_fn, plan, policy, format="luq-fp4", rest="full", backend="auto", seed=0,
        microbatch_size=None, memory=None, example=None, ledger=None, choices=None, resume=False, workers=1,
        exact_sums=False, shard_optimizer=False, partition="even", watch=None,
    ):  # fmt: skip
        request = Request(
            model=model, optimizer=optimizer, train_set=records, loss_fn=loss_fn, plan=plan, policy=policy, seed=seed,
            execution=ExecutionRequest(
                chosen=dpquant.formats.precision(format), rest=dpquant.formats.precision(rest), backend=backend,
                microbatch_size=microbatch_size, memory=memory, exact_sums=exact_sums,
            ),
            example=example, choices=choices, partition=partition,
        )  # fmt: skip
        return begin(
            request,
            lambda seconds: with_doubles(Mechanism.repeatable(mechanism_seed, ledger), **changed),
            make_run=make_run,
        )

    return start


class Silent(PrivateTraining):
    """Computes on private records, and puts zeros in the place of what comes of it."""

    def _clipped_sum(self, pieces, key):
        total = super()._clipped_sum(pieces, key)
        return ClippedSum({name: torch.zeros_like(grad) for name, grad in total.grads.items()}, total.sensitivity)

    def _impact_sum(self, pieces, names, keys):
        total = super()._impact_sum(pieces, names, keys)
        return ImpactSum(torch.zeros_like(total.impacts), total.sensitivity)
