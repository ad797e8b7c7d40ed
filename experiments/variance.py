# SPDX-License-Identifier: Apache-2.0
"""E5: variance of the quantizer on activations and output gradients of a network, measured and by the exact formula.

The format is E3M0 with stochastic rounding, and variances are in units of the mean square of the values. For comparison
the variance with one scale over the batch is computed, which is not private: one example would change the rounding of
all others.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from dpquant.backends.quantize import quantize_rows
from dpquant.data import dataset as data
from dpquant.data.models import build
from dpquant.formats import E3M0, RoleFormat, Rounding
from dpquant.rounding import row_keys
from experiments.drawing import COLOURS, label_ends, new_figure
from experiments.runner import RESULTS, Site

EXAMPLES, DRAWS = 256, 200


def run(site: Site) -> None:
    """Measure; write results/variance.json and results/variance.png."""
    torch.manual_seed(0)
    split = data.load("fashion-mnist").train
    model = build("resnet18", num_classes=10, input_shape=(1, 28, 28))
    inputs, targets = split.batch(torch.arange(EXAMPLES))
    rows = []
    for name, tensors in operands(model, inputs, targets).items():
        for role, x in tensors.items():
            shared = x.reshape(1, -1)
            row = {
                "layer": name,
                "role": role,
                "formula": float(exact_variance(x.flatten(1)).sum() / x.square().sum()),
                "measured": float(measured_variance(x) / x.square().sum()),
                "per_tensor": float(exact_variance(shared).sum() / x.square().sum()),
            }
            rows.append(row)
            print("{layer:24s} {role:10s} {formula:8.4f} {measured:8.4f} {per_tensor:10.4f}".format(**row), flush=True)
    RESULTS.mkdir(exist_ok=True)
    found = {"examples": EXAMPLES, "draws": DRAWS, "rows": rows}
    (RESULTS / "variance.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "variance.png")


def draw(results: dict, path: Path) -> None:
    """Draw what `run` found: the quantizer's variance, layer by layer, by formula and as measured."""
    fields = {
        "formula": ("by formula", "-", COLOURS["blue"]),
        "measured": ("x: measured", "x", COLOURS["black"]),
        "per_tensor": ("one scale a batch", "--", COLOURS["vermilion"]),
    }
    figure, axes = new_figure(columns=2, width=5.6)
    for axis, role in zip(axes, ("activation", "gradient"), strict=True):
        chosen = [row for row in results["rows"] if row["role"] == role]
        axis.set_yscale("log")
        ends = {}
        for field, (words, style, colour) in fields.items():
            values = [row[field] for row in chosen]
            axis.plot(range(1, len(chosen) + 1), values, style, color=colour)
            ends[words] = (len(chosen), values[-1], colour)
        label_ends(axis, ends)
        axis.set(xlabel="layer", ylabel="variance / mean square")
        axis.set_title(f"{role}s, E3M0", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


def exact_variance(x_BN: torch.Tensor) -> torch.Tensor:
    """Return each element's variance under stochastic rounding to E3M0, one scale per row: terms of Proposition 1."""
    magnitude = x_BN.abs().double()
    unit = magnitude.amax(1, keepdim=True).clamp(min=1e-300) / E3M0.max_code
    below = torch.exp2(torch.log2((magnitude / unit).clamp(min=1)).floor()) * unit
    inside = (magnitude - below) * (2 * below - magnitude)
    return torch.where(magnitude < unit, magnitude * (unit - magnitude), inside)


def measured_variance(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over `DRAWS` draws of the squared error, summed over elements."""
    role = RoleFormat(format=E3M0, rounding=Rounding.STOCHASTIC)
    total = torch.zeros((), dtype=torch.float64)
    for draw in range(DRAWS):
        keys = row_keys(draw, torch.arange(len(x)))
        q = quantize_rows(x.contiguous(), role, keys)
        total += (q.dequantize().double() - x).square().sum()
    return total / DRAWS


def operands(model, inputs, targets) -> dict[str, dict[str, torch.Tensor]]:
    """Return {layer: {"activation": its input, "gradient": the gradient of the summed losses by its output}}."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):

            def keep(module, args, output, name=name):
                found[name] = {"activation": args[0].detach()}
                output.register_hook(lambda g: found[name].__setitem__("gradient", g.detach()))

            handles.append(module.register_forward_hook(keep))
    F.cross_entropy(model(inputs), targets, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return found
