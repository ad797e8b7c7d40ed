# SPDX-License-Identifier: Apache-2.0
"""E4: why four bits hurt private training more. Ordinary beside private training, each with and without luq-fp4.

After every epoch a probe of training records gives, in full precision: norms and largest entries of per-example
gradients, and the variance that the quantizer would add to the layers' activations and output gradients. The probe is
not private: these figures explain, and no run releases them.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dpquant import data
from dpquant.bench import gradient_of
from dpquant.layers import prepare, quantizable_layers, set_policy
from dpquant.private import make_private
from dpquant.settings import TrainSettings
from dpquant.train import accuracy, model_of, optimizer_of, per_example_loss, plan_of, policy_of
from experiments.runner import RESULTS, Site, new_figure, settings_of
from experiments.settings import EPSILON, GTSRB
from experiments.variance import exact_variance, operands

EPOCHS, PROBED, MICROBATCH = 4, 64, 256
ORDINARY_LR = 1e-3  # without noise to overcome, the private rate is too high


def run(site: Site) -> None:
    """Train four times; write results/damage.json and .png."""
    options = site.here(f"{GTSRB} {EPSILON} --epochs {EPOCHS}", "damage")
    if options is None:
        return
    settings = settings_of(options)
    dataset = data.load(settings.data)
    results = {}
    for title, train in {"ordinary": _ordinary, "private": _private}.items():
        for policy in ("none", "all"):
            name = f"{title}, {'full precision' if policy == 'none' else 'luq-fp4'}"
            results[name] = rows = []
            train(
                dataclasses.replace(settings, policy=policy),
                dataset,
                lambda model, rows=rows: rows.append(_probe(model, dataset)),
            )
            print(name, [round(row["accuracy_test"], 3) for row in rows], flush=True)
    (RESULTS / "damage.json").write_text(
        json.dumps({"epochs": EPOCHS, "probed": PROBED, "rows": results}, indent=1) + "\n"
    )
    _draw(results, RESULTS / "damage.png")


def _ordinary(settings: TrainSettings, dataset: data.Dataset, after_epoch: Callable[[nn.Module], None]) -> None:
    """The same optimizer at its usual rate on the mean of unclipped gradients, without noise."""
    settings = dataclasses.replace(settings, lr=ORDINARY_LR)
    model = prepare(model_of(settings, dataset), format=settings.format)
    optimizer = optimizer_of(settings, model)
    for _ in range(EPOCHS):
        set_policy(model, quantizable_layers(model) if settings.policy == "all" else ())
        for ids in torch.randperm(len(dataset.train)).split(round(settings.batch_size)):
            optimizer.zero_grad()
            for piece in ids.split(MICROBATCH):
                (per_example_loss(model, dataset.train.batch(piece)).sum() / len(ids)).backward()
            optimizer.step()
        set_policy(model, ())
        after_epoch(model)


def _private(settings: TrainSettings, dataset: data.Dataset, after_epoch: Callable[[nn.Module], None]) -> None:
    model = model_of(settings, dataset)
    private = make_private(
        model,
        optimizer_of(settings, model),
        dataset.train,
        loss_fn=per_example_loss,
        plan=plan_of(settings),
        policy=policy_of(settings),
        format=settings.format,
        microbatch_size=MICROBATCH,
    )
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
        after_epoch(private.model)


def _probe(model: nn.Module, dataset: data.Dataset) -> dict:
    """Medians over examples and layers."""
    ids = torch.arange(0, len(dataset.train), len(dataset.train) // PROBED)[:PROBED]
    inputs, targets = dataset.train.batch(ids)
    gradients = [gradient_of(model, (inputs[[i]], targets[[i]], ids[[i]])) for i in range(PROBED)]
    found = operands(model, inputs, targets)
    return {
        "accuracy_test": accuracy(model, dataset.test),
        "gradient_norm": statistics.median(float(g.norm()) for g in gradients),
        "largest_entry": statistics.median(float(g.abs().max()) for g in gradients),
        **{
            f"{role}_variance": statistics.median(_variance(tensors[role]) for tensors in found.values())
            for role in ("activation", "gradient")
        },
        **{
            f"{role}_relative_variance": statistics.median(
                _variance(tensors[role]) / max(float(tensors[role].square().sum()), 1e-30) for tensors in found.values()
            )
            for role in ("activation", "gradient")
        },
    }


def _variance(x: Tensor) -> float:
    return float(exact_variance(x.flatten(1)).sum())


def _draw(results: dict, path: Path) -> None:
    figure, axes = new_figure(columns=3)
    for axis, field in zip(axes, ("accuracy_test", "gradient_norm", "gradient_variance"), strict=True):
        for name, rows in results.items():
            axis.plot(range(1, EPOCHS + 1), [row[field] for row in rows], "o-", label=name)
        axis.set(xlabel="epoch", title=field.replace("_", " "))
        if field != "accuracy_test":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
