# SPDX-License-Identifier: Apache-2.0
"""Reading of records that do not fit into memory: `scripts/bench data`.

Rows a second: batches of chosen rows, ascending, are read by each of three ways in turn: dpquant's `RowFile`, numpy's
memory map, and an Arrow IPC file (`take` on a memory map; left out without pyarrow). Every row's bytes are compared
first. Warm: the file was read before. Cold: the kernel was asked to drop it (`posix_fadvise`) before each batch.

Workers: a step's microbatches of 128 rows, read ahead by that many threads (`--workers` of `dpquant train`) while
nothing is computed, so that reading alone is timed.

Memory: a short private run over many packed records, in a process of its own. Files are sparse, so that the disk need
not have the space. Counted is the peak of the resident set after everything is imported, minus what it was then: data,
network, checks, steps and evaluation together. `--run FOLDER` is that process.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dpquant
from benchmarks.results import folder_here
from dpquant.app.bench import Spread
from dpquant.data.dataset import Dataset
from dpquant.data.pack import seal
from dpquant.data.packed import load_packed
from dpquant.data.row_file import RowFile
from dpquant.data.rows import Rows
from dpquant.machine import Hardware
from dpquant.runs import fingerprint
from dpquant.runs.evaluation import metrics, per_example_loss
from dpquant.training.ahead import made_ahead

ROW_BYTES = (3072, 150_528)  # images of 32x32 and of 224x224, three bytes a pixel
BATCH = 1024
MICROBATCH = 128
WORKERS = (1, 2, 4)
STEPS = 3
_KIB = 1024

Reader = Callable[[np.ndarray], np.ndarray]


def readers_of(folder: Path, rows: int, row_bytes: int) -> dict[str, tuple[Path, Reader]]:
    """Write random rows for each way to read them, and return {way: (file, reader)}."""
    random = np.random.default_rng(0)
    values = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.uint8, shape=(rows, row_bytes))
    for start in range(0, rows, BATCH):
        values[start : start + BATCH] = random.integers(0, 256, (min(BATCH, rows - start), row_bytes), dtype=np.uint8)
    values.flush()
    file, mapped = RowFile(folder / "rows.npy"), np.load(folder / "rows.npy", mmap_mode="r")
    found: dict[str, tuple[Path, Reader]] = {
        "RowFile": (folder / "rows.npy", lambda ids: file.rows(torch.from_numpy(ids)).numpy()),
        "memory map": (folder / "rows.npy", lambda ids: mapped[ids]),
    }
    try:
        import pyarrow as pa
    except ImportError:
        return found
    kind = pa.binary(row_bytes)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("row", kind)])) as out:
        for start in range(0, rows, BATCH):
            piece = np.ascontiguousarray(values[start : start + BATCH])
            array = pa.FixedSizeBinaryArray.from_buffers(kind, len(piece), [None, pa.py_buffer(piece)])
            out.write_batch(pa.record_batch([array], names=["row"]))
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()

    def taken(ids: np.ndarray) -> np.ndarray:
        column = table.column("row").take(pa.array(ids)).combine_chunks()
        array = column if isinstance(column, pa.Array) else column.chunk(0)
        flat = np.frombuffer(array.buffers()[1], dtype=np.uint8, count=len(ids) * row_bytes, offset=array.offset)
        return flat.reshape(len(ids), row_bytes).copy()

    found["Arrow IPC"] = (folder / "rows.arrow", taken)
    return found


def dropped(path: Path) -> None:
    """Ask the kernel to forget a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speeds(folder: Path, mib: int, rounds: int) -> list[dict]:
    """Measure rows a second of every way, warm and cold, for each size of a row."""
    results = []
    for row_bytes in ROW_BYTES:
        rows = max(2 * BATCH, mib * 2**20 // row_bytes)
        readers, random = readers_of(folder, rows, row_bytes), np.random.default_rng(1)
        first = np.sort(random.choice(rows, BATCH, replace=False))
        expected = readers["RowFile"][1](first)
        for name, (_, read) in readers.items():
            assert np.array_equal(read(first), expected), name
        for cold in (False, True):
            seconds: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(rounds):
                ids = np.sort(random.choice(rows, BATCH, replace=False))
                for name, (path, read) in readers.items():
                    if cold:
                        dropped(path)
                    began = time.perf_counter()
                    read(ids)
                    seconds[name].append(time.perf_counter() - began)
            for name, times in seconds.items():
                spread = Spread.of([BATCH / one for one in times])
                print(f"{row_bytes:>8} bytes  {'cold' if cold else 'warm'}  {name:<11} {spread!s} rows/s")
                facts = {"row_bytes": row_bytes, "rows": rows, "cold": cold, "way": name}
                results.append({**facts, "rows_per_second": dataclasses.asdict(spread), "rounds": rounds})
    return results


def with_workers(folder: Path, mib: int, rounds: int) -> list[dict]:
    """Measure rows a second of `RowFile` by number of threads that read microbatches ahead, warm and cold."""
    results = []
    for row_bytes in ROW_BYTES:
        rows = max(2 * BATCH, mib * 2**20 // row_bytes)
        path, reader = readers_of(folder, rows, row_bytes)["RowFile"]
        random = np.random.default_rng(2)
        for cold in (False, True):
            seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
            for _ in range(rounds):
                pieces = np.split(np.sort(random.choice(rows, BATCH, replace=False)), BATCH // MICROBATCH)
                for workers, times in seconds.items():
                    if cold:
                        dropped(path)
                    began = time.perf_counter()
                    read = list(made_ahead([partial(reader, ids) for ids in pieces], workers))
                    times.append(time.perf_counter() - began)
                    assert sum(map(len, read)) == BATCH
            for workers, times in seconds.items():
                spread = Spread.of([BATCH / one for one in times])
                print(f"{row_bytes:>8} bytes  {'cold' if cold else 'warm'}  {workers} workers   {spread!s} rows/s")
                facts = {"row_bytes": row_bytes, "rows": rows, "cold": cold, "workers": workers}
                results.append({**facts, "rows_per_second": dataclasses.asdict(spread), "rounds": rounds})
    return results


def sparse(folder: Path, records: int) -> Path:
    """Write packed records of 3 KiB, all zeros, that take no space on the disk, and return their folder."""
    columns = ROW_BYTES[0] // 4
    for part, count in (("train", records), ("test", 100)):
        (folder / part).mkdir(parents=True)
        np.lib.format.open_memmap(folder / part / "inputs.npy", mode="w+", dtype=np.float32, shape=(count, columns))
        np.save(folder / part / "targets.npy", np.zeros(count, dtype=np.int64))
        np.save(folder / part / "readable.npy", np.ones(count, dtype=np.bool_))
    few = Rows(torch.zeros(1, columns), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))
    facts = {"name": "sparse", "num_classes": 2, "input_shape": (columns,), "class_names": ("a", "b")}
    seal(folder, Dataset(train=few, test=few, public_size=None, **facts), "rows", {})
    return folder


def peak_kib() -> int:
    """Return the peak of this process' resident set; `getrusage` would begin with that of the parent."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def run(folder: Path) -> dict[str, float]:
    """Train some private steps on packed records and test the model; return MiB of the process before and at most."""
    imported = peak_kib()
    dataset = load_packed("packed:sparse", folder)
    records = len(dataset.train)
    salt = "00"
    fingerprint.know(folder.parent / "records.json", salt, fingerprint.hash_of(dataset.train, salt))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0,
        delta=1e-9,
        max_grad_norm=1.0,
        sample_rate=min(0.5, 256 / records),
        expected_batch_size=256,
        steps=STEPS,
    )
    model = nn.Sequential(nn.Linear(dataset.input_shape[0], 16), nn.ReLU(), nn.Linear(16, 2))
    private = dpquant.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        dataset.train,
        loss_fn=per_example_loss,
        plan=plan,
        policy=dpquant.AllPolicy(),
        backend="simulate",
        microbatch_size=32,
    )
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    metrics(private.model, dataset.test, dataset.task)
    return {"records": records, "imported_mib": imported / _KIB, "peak_mib": peak_kib() / _KIB}


def memory(folder: Path, records: int) -> dict[str, float]:
    """Measure the memory of a run on that many packed records, in a process of its own."""
    packed = sparse(folder / f"packed-{records}", records)
    command = [sys.executable, "-m", "benchmarks.data", "--run", str(packed)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Measure speeds and memory; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000_000, 1_000_000, 100_000])
    parser.add_argument("--mib", type=int, default=2048, help="size of the files whose rows are timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk that is measured")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--run", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(run(args.run)))
        return
    hardware = Hardware.here()
    print(f"{hardware}{' (busy)' if hardware.busy else ''}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = speeds(Path(name), args.mib, args.rounds)
        ahead = with_workers(Path(name), args.mib, args.rounds)
        used = [memory(Path(name), records) for records in args.records]
    for one in used:
        print(
            f"{one['records']:,} records of {ROW_BYTES[0]} bytes: {one['peak_mib'] - one['imported_mib']:.0f} MiB "
            f"above the {one['imported_mib']:.0f} after imports"
        )
    record = {"rows": rows, "workers": ahead, "memory": used}
    record = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, **record}
    (args.out or folder_here() / "data.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
