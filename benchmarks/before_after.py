# SPDX-License-Identifier: Apache-2.0
"""Compares two versions of the package: checks that they compute equal bits, and times their steps.

    git worktree add ../before COMMIT
    scripts/bench before_after --old ../before

A version is a checkout, or a folder where the package is installed, which has kernels of its own:

    .venv/bin/python -m pip install --no-deps --target ../installed ../before
    scripts/bench before_after --old ../installed

--new compares with another version than this checkout's. Both versions are loaded in this process and train the same
networks from the same parameters, with the same mechanism_seed and the same choices: the older version decides first,
and its decisions are given to the newer one. After every step the parameters must be equal, bit for bit. The versions
take steps in turns, in alternating order. The result is the older version's time over the newer one's: above 1 the
newer one is faster.

With --close, parameters in full precision may differ by round-off; quantized they must still be equal. Since linear
layers became matrix products, on `(B, D)` and later on sequences, and then oneDNN's, their sums end in other bits.
Networks are in evaluation mode then: a product with another layout in memory has dropout draw another mask. Commit
5a4364d draws other batches for the same seed: a version from before it can only be compared with another one from
before it. All changes of bits that were meant are in docs/log.md.
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


def load(place: Path, native: ModuleType | None = None) -> dict[str, ModuleType]:
    """Return {name: module} of another version of the package.

    Args:
      place: a checkout, or a folder where the package is installed.
      native: its kernels; None: those that are installed beside it, and for a checkout this version's.
    """
    package = place / "src" / "dpquant"
    if not package.is_dir():
        package = place / "dpquant"
        native = native or native_in(place)
    native = native or _native
    modules: dict[str, ModuleType] = {}
    with without_editable_finder(), as_dpquant(modules):
        spec = importlib.util.spec_from_file_location("dpquant", package / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(package)]
        sys.modules |= {"dpquant": module, "dpquant._native": native}
        spec.loader.exec_module(module)
        vars(module)["_native"] = native
        for found in pkgutil.walk_packages(module.__path__, "dpquant."):
            if found.name not in ("dpquant.__main__", "dpquant._native"):  # the first runs the command line
                importlib.import_module(found.name)
    return modules


@contextlib.contextmanager
def without_editable_finder() -> Iterator[None]:
    """Context: modules are not found by the finder of editable installations, which knows only this checkout.

    Finders that an import adds meanwhile stay: `importlib_metadata` puts its own in the place of the standard one.
    """
    editable = [finder for finder in sys.meta_path if "editable" in type(finder).__module__]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in editable]
    try:
        yield
    finally:
        sys.meta_path[:0] = editable


def native_in(folder: Path) -> ModuleType:
    """Return the native kernels of a package that is installed in a folder.

    Raises:
      SystemExit: there are none.
    """
    files = list((folder / "dpquant").glob("_native.*so")) + list((folder / "dpquant").glob("_native.*pyd"))
    if not files:
        raise SystemExit(f"error: Expected native kernels in {folder}/dpquant; got none.")
    spec = importlib.util.spec_from_file_location("dpquant._native", files[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def compared(
    old: dict[str, ModuleType], new: dict[str, ModuleType], network: nn.Module, data: list, policy: str, steps: int,
    same: str,
) -> dict:  # fmt: skip
    """Take steps of both versions in turns and return the ratio of their times.

    Raises:
      AssertionError: parameters differ after a step.
    """
    with as_dpquant(old):
        before, step_before = start(old["dpquant"], copy.deepcopy(network), data, policy, None)
        step_before()
        choices = json.loads(before.choices.to_json())["choices"]
    with as_dpquant(new):
        made = new["dpquant.backends.choose"].Choices(choices)
        after, step_after = start(new["dpquant"], copy.deepcopy(network), data, policy, made)
        step_after()
    ratios = []
    for number in range(steps):
        seconds = {}
        for version, step in [(old, step_before), (new, step_after)][:: 1 if number % 2 else -1]:
            with as_dpquant(version):
                began = time.perf_counter()
                step()
                seconds[version is old] = time.perf_counter() - began
        for (name, one), two in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
            assert SAME[same](one, two), f"{name} differs after {number + 2} steps"
        ratios.append(seconds[True] / seconds[False])
    spread = Spread.of(ratios)
    return {"old_over_new": dataclasses.asdict(spread), "steps_equal": steps + 1}


def loaded() -> dict[str, ModuleType]:
    """Return {name: module} of this version."""
    importlib.import_module("dpquant.backends.choose")
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dpquant"}


def main() -> None:
    """Compare, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the older version: checkout or where it is installed")
    parser.add_argument("--new", type=Path, help="the newer version, told likewise [this checkout]")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--close", action="store_true", help="full precision may differ by round-off; no dropout")
    parser.add_argument("--only", default="", help="a network's name; its figures are printed and not kept")
    args = parser.parse_args()
    hardware, rows = Hardware.here(), {}
    print(f"{hardware}{' (busy)' if hardware.busy else ''}", flush=True)
    old, new = load(args.old), loaded() if args.new is None else load(args.new)
    for name, network, data in networks():
        if args.only not in ("", name):
            continue
        network.train(not args.close)
        for policy in ("NonePolicy", "AllPolicy"):
            close = args.close and policy == "NonePolicy"
            rows[f"{name}, {policy}"] = row = compared(
                old, new, network, data, policy, args.steps, "close" if close else "equal"
            )
            row["equal"] = not close
            print(
                f"{name}, {policy}: {'close' if close else 'equal'}; old / new {Spread(**row['old_over_new'])}",
                flush=True,
            )
    if args.only:
        return
    versions = [place.resolve().name for place in (args.old, args.new) if place is not None]
    path = folder_here() / f"{'-'.join(['before_after', *versions])}.json"
    path.write_text(
        json.dumps({"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "rows": rows}, indent=1)
    )
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
