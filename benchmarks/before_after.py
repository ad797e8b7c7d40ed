# SPDX-License-Identifier: Apache-2.0
"""Compares two versions of the package: checks that they compute equal bits, and times their steps.

    git worktree add ../before COMMIT
    scripts/bench before_after --old ../before

Both versions are loaded in this process and train the same networks from the same parameters, with the same
mechanism_seed and the same choices: the older version decides first, and its decisions are given to the newer one.
After every step the parameters must be equal, bit for bit. The versions take steps in turns, in alternating order. The
result is the older version's time over the newer one's: above 1 the newer one is faster.

With --close, parameters in full precision may differ by round-off; quantized they must still be equal. Since linear
layers that are called on `(B, D)` became matrix products, their sums end in other bits.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpquant
from benchmarks.checks import Block
from benchmarks.results import folder_here
from dpquant import _native
from dpquant.app.bench import Spread
from dpquant.data.models import build
from dpquant.machine import Hardware

RECORDS, BATCH = 512, 256


class Words(nn.Module):
    """A small transformer: two blocks of width 64 over 32 of 1,000 words."""

    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Embedding(1000, 64), nn.Sequential(Block(64, 4, 256), Block(64, 4, 256))
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(ids)).mean(1))


def networks() -> Iterator[tuple[str, nn.Module, list[tuple[Tensor, int]]]]:
    """Yield (name, network, records)."""
    torch.manual_seed(0)
    images = torch.randn(RECORDS, 3, 32, 32)
    for name, width in (("cnn", 1.0), ("resnet18-cifar", 0.25)):
        network = build(name, num_classes=10, input_shape=(3, 32, 32), width=width)
        yield name, network, [(image, number % 10) for number, image in enumerate(images)]
    ids = torch.randint(0, 1000, (RECORDS, 32))
    yield "transformer", Words(), [(row, number % 10) for number, row in enumerate(ids)]
    tables = torch.randn(RECORDS, 30)
    mlp = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    yield "mlp", mlp, [(row, number % 10) for number, row in enumerate(tables)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@contextlib.contextmanager
def as_dpquant(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Context: `import dpquant` gives these modules."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "dpquant"}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "dpquant"]:
            modules[name] = sys.modules.pop(name)
        sys.modules.update(ours)


def load(checkout: Path, native: ModuleType = _native) -> dict[str, ModuleType]:
    """Return {name: module} of another checkout's package, with the native kernels of this one or others."""
    package = checkout / "src" / "dpquant"
    modules: dict[str, ModuleType] = {}
    finders = sys.meta_path[:]
    sys.meta_path[:] = [
        finder for finder in finders if "editable" not in type(finder).__module__
    ]  # the editable finder knows only this checkout
    try:
        with as_dpquant(modules):
            spec = importlib.util.spec_from_file_location("dpquant", package / "__init__.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            module.__path__ = [str(package)]
            sys.modules |= {"dpquant": module, "dpquant._native": native}
            spec.loader.exec_module(module)
            vars(module)["_native"] = native
            for found in pkgutil.walk_packages(module.__path__, "dpquant."):
                if found.name != "dpquant.__main__":  # which runs the command line
                    importlib.import_module(found.name)
    finally:
        sys.meta_path[:] = finders
    return modules


def start(package: ModuleType, network: nn.Module, data: list, policy: str, choices: Any) -> tuple[Any, Callable]:
    """Return a run of a version of the package, and a function that takes its next step."""
    plan = package.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=BATCH / RECORDS, expected_batch_size=BATCH,
        steps=10_000,
    )  # fmt: skip
    private = package.make_private(
        network, torch.optim.SGD(network.parameters(), lr=0.1), data, loss_fn=loss, plan=plan,
        policy=getattr(package, policy)(), mechanism_seed=1, microbatch_size=64, choices=choices,
    )  # fmt: skip
    batches = (batch for epoch in private.epochs() for batch in epoch)
    return private, lambda: private.step(next(batches))


SAME: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "equal": torch.equal,
    "close": functools.partial(torch.allclose, rtol=1e-3, atol=1e-5),
    "any": lambda one, two: True,
}
"""{what parameters have to be after each step: whether two are}."""


def compared(old: dict[str, ModuleType], network: nn.Module, data: list, policy: str, steps: int, same: str) -> dict:
    """Take steps of both versions in turns and return the ratio of their times.

    Raises:
      AssertionError: parameters differ after a step.
    """
    with as_dpquant(old):
        before, step_before = start(old["dpquant"], copy.deepcopy(network), data, policy, None)
        step_before()
        choices = json.loads(before.choices.to_json())["choices"]
    after, step_after = start(dpquant, copy.deepcopy(network), data, policy, dpquant_choices(choices))
    step_after()
    ratios = []
    for number in range(steps):
        seconds = {}
        for name, step in [("old", step_before), ("new", step_after)][:: 1 if number % 2 else -1]:
            with as_dpquant(old) if name == "old" else contextlib.nullcontext():
                began = time.perf_counter()
                step()
                seconds[name] = time.perf_counter() - began
        for (name, one), two in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
            assert SAME[same](one, two), f"{name} differs after {number + 2} steps"
        ratios.append(seconds["old"] / seconds["new"])
    spread = Spread.of(ratios)
    return {"old_over_new": dataclasses.asdict(spread), "steps_equal": steps + 1}


def dpquant_choices(made: dict[str, Any]) -> Any:
    from dpquant.backends.choose import Choices

    return Choices(made)


def main() -> None:
    """Compare, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--close", action="store_true", help="round-off may differ in full precision")
    parser.add_argument("--only", default="", help="a network's name; its figures are printed and not kept")
    args = parser.parse_args()
    hardware, rows = Hardware.here(), {}
    print(f"{hardware}{' (busy)' if hardware.busy else ''}", flush=True)
    old = load(args.old)
    for name, network, data in networks():
        if args.only not in ("", name):
            continue
        for policy in ("NonePolicy", "AllPolicy"):
            close = args.close and policy == "NonePolicy"
            rows[f"{name}, {policy}"] = row = compared(
                old, network, data, policy, args.steps, "close" if close else "equal"
            )
            row["equal"] = not close
            print(
                f"{name}, {policy}: {'close' if close else 'equal'}; old / new {Spread(**row['old_over_new'])}",
                flush=True,
            )
    if args.only:
        return
    path = folder_here() / "before_after.json"
    path.write_text(
        json.dumps({"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "rows": rows}, indent=1)
    )
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
