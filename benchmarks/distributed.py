# SPDX-License-Identifier: Apache-2.0
"""Two processes of one thread against one process of two: `scripts/bench distributed`.

    scripts/bench distributed
    scripts/bench distributed --rounds 5 --gigabytes 1 --format int8

Both sides are there all the time and take turns, in an order that changes; the one whose turn it is not sleeps. Both
draw the same batches, and no step that is timed begins an epoch. A step is a whole step of `dpquant.make_private`:
charge, sum, exchange, noise, optimizer. `text` is an encoder of MiniLM's size (`benchmarks/lora.py`). Then the exchange
is timed alone: of the network's values, and of so many gigabytes of float32, with the peak memory of each process above
those values.

One machine shows what the exchange costs, and not what a network adds.
"""

import argparse
import datetime
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import torch
import torch.distributed as dist

import dpquant
from benchmarks.lora import losses, network, records
from benchmarks.results import keep_rows
from dpquant.app.bench import Spread
from dpquant.app.cli import sleep_soon
from dpquant.app.networks import NETWORKS, build_network
from dpquant.app.synthetic import SyntheticRecords
from dpquant.engine.batches import take_rows
from dpquant.formats import FULL_PRECISION
from dpquant.machine import memory_mib, now, reset_peak
from dpquant.runs.evaluation import per_example_loss
from dpquant.training.distributed import Group, group_here
from dpquant.training.exchange import noisy_means
from dpquant.training.private import PrivateTraining
from dpquant.training.scaling import Network

SIDES = {"one": (1, 2), "two": (2, 1)}  # {name: (processes, threads each)}
MODELS = ("resnet18-cifar", "text")
BATCHES = 16  # in an epoch: what is done once an epoch is not done in a step that is timed
STEPS = 10_000  # of the plan: more than are ever taken
_EXCHANGES = 3


class Texts:
    """Texts of different lengths, one by one."""

    def __init__(self, count: int):
        self._batch, self._count = records(count), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        one = take_rows(self._batch, slice(index, index + 1))
        return {"inputs": {name: row[0] for name, row in one["inputs"].items()}, "labels": one["labels"][0]}


def run_of(name: str, batch_size: int, format: str, **settings: Any) -> PrivateTraining:
    """Return a run that draws the same batches on every side. `settings` are of `make_private`."""
    count = BATCHES * batch_size
    if name == "text":
        model, data, loss = network("all"), Texts(count), losses
    else:
        facts = NETWORKS[name]
        model = build_network(name, facts.image_size)
        data = SyntheticRecords(facts.input_shape(facts.image_size), facts.num_classes, count)
        loss = per_example_loss
    return dpquant.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        data,
        loss_fn=loss,
        plan=dpquant.PrivacyPlan(
            noise_multiplier=1.0,
            delta=1e-5,
            max_grad_norm=1.0,
            sample_rate=1 / BATCHES,
            expected_batch_size=batch_size,
            steps=STEPS,
        ),
        policy=dpquant.NonePolicy() if format == FULL_PRECISION.name else dpquant.AllPolicy(),
        format="int8" if format == FULL_PRECISION.name else format,
        **{"microbatch_size": min(batch_size // 2, 32), "mechanism_seed": 0, **settings},
    )


def exchange_seconds(group: Group, values: dict[str, torch.Tensor]) -> list[float]:
    """Return the seconds of some exchanges of these sums, without noise."""
    found = []
    for _ in range(_EXCHANGES):
        began = now()
        for _, mean in noisy_means(group, values, lambda name, part, total: total, torch.float32):
            mean.untyped_storage()  # it has arrived
        found.append(now() - began)
    return found


def side(name: str, given: argparse.Namespace) -> None:
    """Do what is asked for on standard input, one word a line, and answer in JSON on standard output: a process."""
    torch.set_num_threads(SIDES[name][1])
    group = group_here(datetime.timedelta(hours=1))
    run = run_of(given.model, given.batch_size[0], given.format)
    batches = _batches(run)
    for line in sys.stdin:
        match line.strip():
            case "step":
                batch, began, used = next(batches), now(), time.process_time()
                run.step(batch)
                answer: Any = {"seconds": now() - began, "processor_seconds": time.process_time() - used}
            case "exchange":
                sums = {name: p.detach() for name, p in run.model.named_parameters()}
                answer = {"seconds": exchange_seconds(group, sums), "values": sum(p.numel() for p in sums.values())}
            case "gigabytes":
                count = int(given.gigabytes * 1e9 / 4)
                sums = {"sums": torch.ones(count)}
                before, reset = reset_peak()
                seconds = exchange_seconds(group, sums)
                answer = {
                    "seconds": seconds,
                    "values": count,
                    "peak_gb_above": (memory_mib()[1] - before) * 2**20 / 1e9,
                }
                assert reset, "the system does not reset the peak of memory"
            case _:
                break
        answers = group.from_all(json.dumps(answer).encode())
        if group.rank == 0:
            print(json.dumps([json.loads(one) for one in answers]), flush=True)
    if dist.is_initialized():
        dist.barrier()


def _batches(run: PrivateTraining) -> Iterator[Any]:
    for epoch in run.epochs():
        yield from epoch


class Side:
    """The processes of one side; what is asked of one is asked of all."""

    def __init__(self, name: str, options: list[str]):
        size, threads = SIDES[name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(size):
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
            sleep_soon(environment)  # as the command line does
            if size > 1:
                place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {name: str(value) for name, value in place.items()}
            command = [sys.executable, "-m", "benchmarks.distributed", "--side", name, *options]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )

    def ask(self, what: str) -> list[dict[str, Any]]:
        """Return the answers of all processes."""
        for process in self._processes:
            print(what, file=_pipe(process.stdin), flush=True)
        answer = _pipe(self._processes[0].stdout).readline()
        if not answer:
            raise SystemExit(f"a process ended when it was asked for: {what}")
        return json.loads(answer)

    def end(self) -> None:
        """Let all processes end."""
        for process in self._processes:
            print("end", file=_pipe(process.stdin), flush=True)
        for process in self._processes:
            process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def measured(model: str, batch_size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the times of both sides with one model, and those of an exchange of gigabytes if they are asked for."""
    options = ["--model", model, "--batch-size", str(batch_size), "--format", given.format]
    sides = {name: Side(name, [*options, "--gigabytes", str(given.gigabytes)]) for name in SIDES}
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor_seconds": []} for name in SIDES}
    for number in range(given.rounds + 1):
        for name in sorted(SIDES, reverse=number % 2 == 1):
            answers = sides[name].ask("step")
            if number:  # the first fills caches
                found[name]["seconds"].append(max(one["seconds"] for one in answers))
                found[name]["processor_seconds"].append(sum(one["processor_seconds"] for one in answers))
            print(f"{model}, {name}: {answers}", file=sys.stderr, flush=True)
    exchange = sides["two"].ask("exchange")[0]
    large = sides["two"].ask("gigabytes") if given.gigabytes else None
    for one in sides.values():
        one.end()
    medians = {name: statistics.median(times["seconds"]) for name, times in found.items()}
    ratios = [one / two for one, two in zip(found["one"]["seconds"], found["two"]["seconds"], strict=True)]
    print(f"{model}, {batch_size}: one over two {Spread.of(ratios)}", file=sys.stderr, flush=True)
    sent = Network(bandwidth=1.0).bytes_sent(exchange["values"], 2)
    return {
        "model": model,
        "batch_size": batch_size,
        "format": given.format,
        "sides": {name: {"median_seconds": medians[name], **found[name]} for name in SIDES},
        "one_over_two": vars(Spread.of(ratios)),
        "exchange": {**exchange, "megabytes_sent_by_each": sent / 1e6},
        "exchange_share_of_a_step": min(exchange["seconds"]) / medians["two"],
        "gigabytes": None if large is None else {"gigabytes": given.gigabytes, "processes": large},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of them alone")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 512], help="expected records of a step")
    parser.add_argument("--format", default="int8", help="or full")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        side(given.side, given)
        return
    rows = []
    for model, size in itertools.product([given.model] if given.model else MODELS, given.batch_size):
        rows.append(measured(model, size, given))
        given.gigabytes = 0.0  # once is enough
        keep_rows("distributed", rows, given.rounds)
    print(json.dumps([{k: v for k, v in row.items() if k != "sides"} for row in rows], indent=1))


if __name__ == "__main__":
    main()
