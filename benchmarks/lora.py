# SPDX-License-Identifier: Apache-2.0
"""One step of fine-tuning a text encoder of MiniLM's size: PyTorch, Opacus and dpquant, wholly, by LoRA, or its head.

    scripts/bench lora
    scripts/bench lora --what lora --rounds 5 --threads 1 --clock processor

The network is BERT with 6 layers of 384 features and 12 heads, a vocabulary of 30,522 and three classes; its weights
are random, which changes no time. A record has 64 tokens, of which the last are padding. `all`: everything is trained.
`lora`: adapters of rank 8 on query and value, and the classifier. `head`: the classifier alone.

Sides take turns, in an order that changes, in one process; each ends in the same SGD. `full` and `quantized` are
dpquant's, without and with the recipe on every layer. Opacus and `quantized` run in physical batches of each of
`--sizes`, and dpquant also in those that it chooses itself, so that neither is judged by a size that suits the other.
`--clock processor` counts processor time, which others on the machine change less. Before times are taken, the clipped
sum of a few examples is compared with plain autograd, one example at a time. Peak memory is measured in a process for
each side, above what the process holds once network, data and all libraries are there.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.oracle import error_of_sum
from benchmarks.results import folder_here
from dpquant.app.contenders import StepSettings
from dpquant.engine.batches import take_rows
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import prepare, quantizable_layers, set_policy
from dpquant.engine.passes import Objective
from dpquant.machine import Hardware, memory_mib, reset_peak
from dpquant.training.tuning import fastest_microbatch_size

LENGTH, VOCABULARY, CLASSES = 64, 30_522, 3
WHATS = ("all", "lora", "head")
PLAIN_BATCH_SIZE = 64  # ordinary training holds no gradient for each example, and larger products are faster
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Batch = dict[str, Any]
Step = Callable[[], None]


def network(what: str) -> nn.Module:
    """Return the encoder, with the parameters that are not trained frozen."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            max_position_embeddings=512, num_labels=CLASSES,  # pyright: ignore[reportCallIssue]
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        wanted = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], lora_dropout=0.0)
        model = get_peft_model(model, wanted)
    if what == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    return model.train()


def records(count: int) -> Batch:
    """Return a batch of texts of different lengths; each has its position ids, which Opacus needs."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator) * mask
    positions = torch.arange(LENGTH).expand(count, LENGTH).contiguous()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {"inputs": inputs, "labels": torch.randint(0, CLASSES, (count,), generator=generator)}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each example, `(B,)`."""
    return F.cross_entropy(model(**batch["inputs"]).logits, batch["labels"], reduction="none")


def _optimizer(model: nn.Module, settings: StepSettings) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=settings.lr)


def plain(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
    """Make a step of ordinary fine-tuning in pieces, of which each is one pass. Not private."""
    optimizer = _optimizer(model, settings)
    count = len(batch["labels"])

    def step() -> None:
        for piece in _pieces(batch, PLAIN_BATCH_SIZE):
            (losses(model, piece).sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
    """Make a step of Opacus with hooks, in physical batches."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model)
    count = len(batch["labels"])
    optimizer = DPOptimizer(
        _optimizer(wrapped, settings),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=count,
    )

    def step() -> None:
        pieces = list(_pieces(batch, settings.physical_batch_size))
        for number, piece in enumerate(pieces):
            optimizer.zero_grad()
            optimizer.signal_skip_step(do_skip=number + 1 < len(pieces))
            losses(wrapped, piece).mean().backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(model: nn.Module, batch: Batch, settings: StepSettings, *, quantized: bool, size: int | None) -> Step:
    """Make a step of dpquant, with every quantizable layer in the recipe or none; without a size it chooses one."""
    model = prepare(model, format=settings.format)
    layers = quantizable_layers(model)
    set_policy(model, layers if quantized else ())
    optimizer = _optimizer(model, settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count, number = len(batch["labels"]), 0
    size = size or fastest_microbatch_size(
        Objective(model, losses), batch, {name: layer.precision for name, layer in layers.items()},
        expected_batch_size=count, memory=None,
    )  # fmt: skip

    def step() -> None:
        nonlocal number
        number += 1
        total = clipped_sum(
            model, losses, batch, max_grad_norm=settings.max_grad_norm, record_ids=torch.arange(count), step=number,
            seed=0, microbatch_size=min(size, count),
        )  # fmt: skip
        std = settings.noise_multiplier * total.sensitivity
        for name, parameter in trained.items():
            parameter.grad = torch.randn_like(parameter).mul_(std).add_(total.grads[name]).div_(count)
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclasses.dataclass(frozen=True)
class Side:
    """A side of the comparison.

    Attributes:
      name: `plain`, `opacus`, or dpquant's `full` or `quantized`.
      size: examples of a physical batch; None: as dpquant chooses, or plain's usual.
    """

    name: str
    size: int | None = None

    def __str__(self) -> str:
        return self.name if self.size is None else f"{self.name}, {self.size}"

    def step(self, model: nn.Module, batch: Batch, format: str) -> Step:
        """Make its step on a network, which is changed."""
        settings = StepSettings(format=format, physical_batch_size=self.size or PLAIN_BATCH_SIZE)
        if self.name == "plain":
            return plain(model, batch, settings)
        if self.name == "opacus":
            return opacus(model, batch, settings)
        return ours(model, batch, settings, quantized=self.name == "quantized", size=self.size)


def sides(sizes: Sequence[int]) -> list[Side]:
    """Return all sides, dpquant's own choice last."""
    alike = [Side(name, size) for size in sizes for name in ("opacus", "quantized")]
    return [Side("plain"), Side("full"), *alike, Side("quantized")]


def _pieces(batch: Batch, size: int):
    for start in range(0, len(batch["labels"]), size):
        yield take_rows(batch, slice(start, start + size))


def peak_gib(what: str, side: Side, given: argparse.Namespace) -> float:
    """Return the peak memory of a step above what network and data take, GiB, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (what, side, given.batch_size, given.format, torch.get_num_threads()))


def _peak(what: str, side: Side, count: int, format: str, threads: int) -> float:
    import opacus.optimizers  # noqa: F401  a library's own memory is no step's

    torch.set_num_threads(threads)
    model, batch = network(what), records(count)
    before = memory_mib()[0]
    step = side.step(model, batch, format)
    reset_peak()
    step()
    step()  # the first leaves a heap with holes
    return (memory_mib()[1] - before) / 1024


def measured(what: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure what is trained, all sides in turn."""
    torch.manual_seed(0)
    batch = records(given.batch_size)
    error = error_of_sum(what, network(what), losses, records(4), format=given.format)
    contenders, clock = sides(given.sizes), CLOCKS[given.clock]
    steps = {side: side.step(network(what), batch, given.format) for side in contenders}
    seconds: dict[Side, list[float]] = {side: [] for side in contenders}
    for step in steps.values():
        step()  # warms up
    for number in range(given.rounds):
        first = number % len(contenders)
        for side in contenders[first:] + contenders[:first]:
            began = clock()
            steps[side]()
            seconds[side].append(clock() - began)
    del steps
    memory = {str(side): peak_gib(what, side, given) for side in contenders if given.memory}
    ratios = {}
    for ours in (side for side in contenders if side.name == "quantized"):
        others = [Side("opacus", ours.size)] if ours.size else [one for one in contenders if one.name != "quantized"]
        for other in others:
            many = sorted(one / own for one, own in zip(seconds[other], seconds[ours], strict=True))
            ratios[f"{other} / {ours}"] = many
            print(
                f"{what}: {other} / {ours} {statistics.median(many):.2f} ({many[0]:.2f} to {many[-1]:.2f})", flush=True
            )
    times = {str(side): many for side, many in seconds.items()}
    for name, many in times.items():
        print(f"{what}: {name} {statistics.median(many):.2f} s, {memory.get(name, float('nan')):.2f} GiB", flush=True)
    return {"what": what, "seconds": times, "ratios": ratios, "peak_gib": memory, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=WHATS, action="append")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256], help="physical batches of both")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    hardware = Hardware.here()
    rows = [measured(what, given) for what in given.what or WHATS]
    result = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "options": vars(given), "rows": rows}
    (folder_here() / "lora.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
