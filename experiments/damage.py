# SPDX-License-Identifier: Apache-2.0
"""E4: why four bits cost private training more. Compares SGD and DP-SGD, each in full precision and in luq-fp4.

After every epoch a few training records are evaluated in full precision (the probe). It gives norms and largest entries
of per-example gradients, the variance that the quantizer would add to the layers' activations and output gradients,
and, for private runs, the noise relative to a batch's clipped gradients. The probe is not private: its figures
explain results on public data, and no run releases them.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dpquant.app.bench import gradient_of
from dpquant.data import dataset as data
from dpquant.engine.layers import prepare, quantizable_layers, set_policy
from dpquant.runs.evaluation import accuracy, per_example_loss
from dpquant.runs.objects import model_of, optimizer_of
from dpquant.runs.settings import TrainSettings, plan_of, policy_of
from dpquant.training.start import make_private
from experiments.drawing import COLOURS, label_ends, new_figure
from experiments.ranking import clipped_gradient
from experiments.runner import RESULTS, Site, settings_of
from experiments.settings import EPSILON, GTSRB, SGD, SHORT
from experiments.variance import exact_variance, operands

PROBED, MICROBATCH = 64, 256
_COLOURS = {"ordinary": COLOURS["black"], "private": COLOURS["vermilion"]}
ORDINARY_LR = 0.1  # for unclipped gradients, which have larger norms


def run(site: Site) -> None:
    """Train four times; write results/damage.json and results/damage.png."""
    options = site.here(f"{GTSRB} {SHORT} {EPSILON} {SGD}", "damage")
    if options is None:
        return
    settings = settings_of(options)
    dataset = data.load(settings.data)
    results = {}
    for title, train in {"ordinary": _ordinary, "private": _private}.items():
        for policy in ("none", "all"):
            name = f"{title}, {'full precision' if policy == 'none' else 'luq-fp4'}"
            chosen = dataclasses.replace(settings, policy=policy)
            results[name] = rows = [
                _probe(model, dataset, chosen, noise_std) for model, noise_std in train(chosen, dataset)
            ]
            print(name, [round(row["accuracy_test"], 3) for row in rows], flush=True)
    found = {"options": f"{SHORT} {EPSILON} {SGD}", "probed": PROBED, "rows": results}
    (RESULTS / "damage.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "damage.png")


def _ordinary(settings: TrainSettings, dataset: data.Dataset) -> Iterator[tuple[nn.Module, float]]:
    """Yield the model and 0 (no noise) after each epoch of ordinary SGD, on means of unclipped gradients."""
    settings = dataclasses.replace(settings, lr=ORDINARY_LR)
    model = prepare(model_of(settings, dataset), format=settings.format)
    optimizer = optimizer_of(settings, model)
    for _ in range(settings.epochs):
        set_policy(model, quantizable_layers(model) if settings.policy == "all" else ())
        for ids in torch.randperm(len(dataset.train)).split(round(settings.batch_size)):
            optimizer.zero_grad()
            for piece in ids.split(MICROBATCH):
                (per_example_loss(model, dataset.train.batch(piece)).sum() / len(ids)).backward()
            optimizer.step()
        set_policy(model, ())
        yield model, 0.0


def _private(settings: TrainSettings, dataset: data.Dataset) -> Iterator[tuple[nn.Module, float]]:
    """Yield the model and the standard deviation of the noise on a batch's summed gradient after each private epoch."""
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
        yield private.model, private.plan.train_noise_std(settings.max_grad_norm)


def _probe(model: nn.Module, dataset: data.Dataset, settings: TrainSettings, noise_std: float) -> dict:
    """Return the figures of one probe: medians over examples and layers, and the noise relative to the clipped sum."""
    ids = torch.arange(0, len(dataset.train), len(dataset.train) // PROBED)[:PROBED]
    inputs, targets = dataset.train.batch(ids)
    gradients = [gradient_of(model, (inputs[[i]], targets[[i]], ids[[i]])) for i in range(PROBED)]
    found = operands(model, inputs, targets)
    batch_ids = torch.arange(0, len(dataset.train), len(dataset.train) // round(settings.batch_size))
    summed = clipped_gradient(model, dataset.train, batch_ids, settings.max_grad_norm, MICROBATCH)
    return {
        "accuracy_test": accuracy(model, dataset.test),
        "gradient_norm": statistics.median(float(g.norm()) for g in gradients),
        "largest_entry": statistics.median(float(g.abs().max()) for g in gradients),
        "noise_over_gradient": noise_std / float(summed.square().mean().sqrt()),
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


def draw(results: dict, path: Path) -> None:
    """Draw what `run` found: accuracy, gradient norm and the quantizer's variance, epoch by epoch."""
    titles = {
        "accuracy_test": "test accuracy",
        "gradient_norm": "norm of a gradient (median)",
        "gradient_variance": "variance of the quantizer on gradients",
    }
    figure, axes = new_figure(columns=3, width=4.2)
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        if field != "accuracy_test":
            axis.set_yscale("log")
        ends = {}
        for name, rows in results["rows"].items():
            values, colour = [row[field] for row in rows], _COLOURS[name.split(",")[0]]
            style = "-" if "full precision" in name else "--"
            axis.plot(range(1, len(rows) + 1), values, style, color=colour)
            ends[name] = (len(rows), values[-1], colour)
        if field == "accuracy_test":
            label_ends(axis, ends)
        axis.set(xlabel="epoch")
        axis.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
