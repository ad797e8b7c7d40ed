# SPDX-License-Identifier: Apache-2.0
"""One process of `test_processes.py`: `worker.py RANK FOLDER` makes all checks and writes FOLDER/rankR.json.

The same processes meet in groups of three, two and one, so that each starts once: `STAGES`.
"""

import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.training import waiting
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


class Own(Reads):
    """A process' own records: notes the ids that are read, and those that it does not have, at which it raises."""

    def __init__(self, records, first):
        super().__init__(records)
        self.first, self.read, self.outside = first, [], []

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            self.outside.append(index)
            raise IndexError(index)
        self.read.append(self.first + index)
        return super().__getitem__(index)


class Waits(Reads):
    """Records, one of which takes some seconds once it has been asked for that."""

    seconds = 0.0

    def __getitem__(self, index):
        time.sleep(self.seconds)
        self.seconds = 0.0
        return super().__getitem__(index)


def begun(
    count=RECORDS, batch=BATCH, noise="gaussian", data=Reads, optimizer=torch.optim.SGD, lr=0.5, **settings
):  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    records = data(list(zip(torch.randn(count, 1, 6, 6), torch.randint(0, 5, (count,)), strict=True)))
    rate = batch / count
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=0.5, sample_rate=rate, expected_batch_size=batch, steps=STEPS,
        analysis=dpquant.AnalysisPlan(
            count=1, sample_rate=rate, expected_batch_size=batch, noise_multiplier=2.0, max_norm=1.0
        ),
        noise=noise,
    )  # fmt: skip
    private = dpquant.make_private(
        model, optimizer(model.parameters(), lr=lr), records, loss_fn=loss, plan=plan,
        microbatch_size=4 if noise == "gaussian" else 1,
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


def apart(folder):
    """Each process has records of its own, one of three none. With discrete noise their bits are those of one."""
    group, parts = group_here(), {1: [RECORDS], 2: [23, RECORDS - 23], 3: [20, 0, RECORDS - 20]}
    counts = parts[group.size]
    first = sum(counts[: group.rank])
    example = list(zip(torch.zeros(2, 1, 6, 6) + torch.arange(2)[:, None, None, None], torch.arange(2), strict=True))
    private, records = begun(
        noise="discrete", partition="range", example=example,
        data=lambda records: Own(records[first : first + counts[group.rank]], first),
    )  # fmt: skip
    records.read.clear()
    list(steps_of(private))
    return {
        "parameters": parameters(private),
        "scores": private.scores,
        "read": sorted(set(records.read)),
        "outside": records.outside,
        "said": "read records of its own" in private.statement(),
    }


def continued(folder):
    """Two steps more of a run with one ledger: by one process, by two, and by one again."""
    stages = [folder / name for name in ("first", "second", "third")]
    done = next(number for number, one in enumerate(stages) if not one.exists())
    group = group_here()
    group.from_all(b"")  # all have looked before one of them writes
    private, _ = begun(exact_sums=True, ledger=folder / "continued.jsonl", resume=True)
    if done:
        private.load(stages[done - 1])
    for number, _ in enumerate(steps_of(private), 1):
        if number == 2:
            break
    if group.rank == 0:
        private.save(stages[done])
    group.from_all(b"")
    private.close()
    said = "had 2 processes: their machines and the network between them are trusted" in private.statement()
    return [parameters(private), private.scores, private.steps_taken, said]


def hangs(folder):
    """One process takes seconds for a record: in a step of a group that others have set up, and then in one of ours.

    The times at which it goes on and at which the other gives up, in seconds.
    """
    waiting.SHORTEST = datetime.timedelta(seconds=1)
    private, records = begun(data=Waits)
    private.step_seconds = 0.01
    late, steps, group = private.group.rank == 1, steps_of(private), private.group
    next(steps)
    records.seconds = 3.0 if late else 0.0
    next(steps)
    waiting.initialised(waiting.TIMEOUT)
    records.seconds = 12.0 if late else 0.0
    try:
        next(steps)
    except dpquant.DPQuantError as error:
        return {"steps": private.steps_taken, "error": type(error).__name__, "at": time.time(), "rank": group.rank}
    return {"steps": private.steps_taken, "error": "", "at": time.time(), "rank": group.rank}


def dies(folder):
    private, _ = begun(ledger=folder / "ledger.jsonl")
    try:
        for number, _ in enumerate(steps_of(private), 1):
            if number == 2 and private.group.rank == 1:
                os._exit(9)
    except dpquant.DPQuantError as error:
        return f"{type(error).__name__}: {error}"


ALL = (exact, sharded, plain, messages, tensors, empty, ledger, apart)
STAGES = [(3, ALL), (1, (*ALL, continued)), (2, (*ALL, continued, hangs)), (1, (continued,)), (2, (dies,))]
"""Numbers of processes and their checks. A check that breaks the group is the last."""


def main(rank, folder):
    assert isinstance(group_here(), Alone), "nothing is initialised yet"
    found = []
    for number, (size, checks) in enumerate(STAGES):
        if rank >= size:
            continue
        store = dist.FileStore(f"{folder}/store{number}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        assert isinstance(group_here(), Alone if size == 1 else TorchGroup)
        own = Path(folder, str(number))
        own.mkdir(exist_ok=True)
        results = {check.__name__: check(Path(folder) if check is continued else own) for check in checks}
        found.append([size, results])
        Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
