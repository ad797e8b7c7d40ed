# SPDX-License-Identifier: Apache-2.0
"""One process of `test_processes.py`: `worker.py RANK SIZE FOLDER CHECK...` writes FOLDER/rankR.json."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.distributed import Alone, TorchGroup, group_here

RECORDS, BATCH, STEPS = 60, 12, 5


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Reads:
    """Records that count how often they are read."""

    def __init__(self, records):
        self._records, self.count = records, 0

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        self.count += 1
        return self._records[index]


def begun(count=RECORDS, batch=BATCH, optimizer=torch.optim.SGD, lr=0.5, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    records = Reads(list(zip(torch.randn(count, 1, 6, 6), torch.randint(0, 5, (count,)), strict=True)))
    rate = batch / count
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=0.5, sample_rate=rate, expected_batch_size=batch, steps=STEPS,
        analysis=dpquant.AnalysisPlan(
            count=1, sample_rate=rate, expected_batch_size=batch, noise_multiplier=2.0, max_norm=1.0
        ),
    )  # fmt: skip
    private = dpquant.make_private(
        model, optimizer(model.parameters(), lr=lr), records, loss_fn=loss, plan=plan, microbatch_size=4,
        policy=dpquant.DPQuantPolicy(fraction=0.5), backend="simulate", mechanism_seed=3, **settings,
    )  # fmt: skip
    return private, records


def parameters(private):
    flat = torch.cat([p.detach().flatten() for p in private.model.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def steps_of(private):
    for epoch in private.epochs():
        for batch in epoch:
            yield private.step(batch)


def exact(folder):
    private, _ = begun(exact_sums=True)
    list(steps_of(private))
    return [parameters(private), private.scores]


def sharded(folder):
    """Parameters, and the optimizer's state after a checkpoint of process 0."""
    private, _ = begun(exact_sums=True, shard_optimizer=True, optimizer=torch.optim.AdamW, lr=0.01)
    list(steps_of(private))
    held = sum(v.numel() for state in getattr(private._steps, "_state", {}).values() for v in state.values())
    private.gather_state()
    if private.group.rank == 0:
        private.save(folder / "sharded")
    private.group.from_first(b"saved")
    state = Checkpoint.read(folder / "sharded").parts["optimizer"]["state"]
    flat = torch.cat([state[i][key].flatten() for i in sorted(state) for key in sorted(state[i])])
    return {"bits": [parameters(private), hashlib.sha256(flat.numpy().tobytes()).hexdigest()], "held": held}


def plain(folder):
    private, _ = begun(ledger=folder / "plain.jsonl")
    list(steps_of(private))
    return {"parameters": parameters(private), "charged": [[e.kind, e.count] for e in private.events()]}


def messages(folder):
    group = group_here()
    first = [group.from_first(f"from {group.rank}".encode()).decode() for _ in range(2)]
    return [first, [one.decode() for one in group.from_all((f"from {group.rank}" * group.rank).encode())]]


def tensors(folder):
    """Whether slices come from the right processes, in every dtype that is sent."""
    group, right = group_here(), []
    for dtype in (torch.float32, torch.int64):
        n = torch.arange(group.size * 3, dtype=dtype)
        rows = group.exchanged(n + 100 * group.rank)
        wanted = torch.stack([n.view(group.size, 3)[group.rank] + 100 * one for one in range(group.size)])
        whole = group.gathered(torch.full((2,), group.rank, dtype=dtype))
        right.append(torch.equal(rows, wanted) and whole.tolist() == [one for one in range(group.size) for _ in "ab"])
    return right


def empty(folder):
    """A few records, so that shares are empty; which exchanges are made, and how many records each step reads."""
    private, records = begun(count=6, batch=1)
    kind, made = type(private.group), []

    class Counting(kind):
        def exchanged(self, flat):
            made.append(len(flat))
            return super().exchanged(flat)

    private.group, read = Counting(), []
    for _ in steps_of(private):
        read.append(records.count - sum(read))
    return {"exchanges": len(made), "read": read, "parameters": parameters(private)}


def ledger(folder):
    """The ledger's file becomes unwritable on process 0 after the start."""
    private, records = begun(ledger=folder / "broken.jsonl")
    own = getattr(private._mechanism.ledger, "_own", private._mechanism.ledger)
    if own is not None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), own._file._descriptor)
    before = records.count
    try:
        list(steps_of(private))
    except dpquant.LedgerError as error:
        return {"error": type(error).__name__, "read": records.count - before}
    return {"error": "", "read": records.count - before}


def dies(folder):
    private, _ = begun(ledger=folder / "ledger.jsonl")
    for number, _ in enumerate(steps_of(private), 1):
        if number == 2 and private.group.rank == 1:
            os._exit(9)


def main(rank, size, folder, *checks):
    assert isinstance(group_here(), Alone), "nothing is initialised yet"
    store = dist.FileStore(f"{folder}/store", int(size))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size))
    assert isinstance(group_here(), Alone if size == "1" else TorchGroup)
    found = {check: globals()[check](Path(folder)) for check in checks}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
