# SPDX-License-Identifier: Apache-2.0
"""Times whole runs of `dpquant train` with and without quantized layers, in turns.

    scripts/bench end_to_end --folder DIR

The time includes the start of the process, data loading, measurements at the start, analyses, noise and evaluation. DIR
holds train/CLASS/* and test/CLASS/*. Each pair of runs is appended to benchmarks/results/<cpu>-<date>/end_to_end.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import folder_here
from dpquant.machine import Hardware

POLICIES = {"none": ["--policy", "none"], "dpquant": ["--policy", "dpquant", "--macs", "0.9"]}
KEPT = (
    "seconds_total",
    "seconds_train",
    "seconds_analysis",
    "accuracy_test",
    "epsilon",
    "quantized_fraction_macs",
    "execution",
)


def main() -> None:
    """Run both policies in turns and append the pairs to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the images")
    parser.add_argument("--records", default="39209", help="public number of training records [that of GTSRB]")
    parser.add_argument("--model", default="resnet18-cifar")
    parser.add_argument("--width", default="1.0")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--batch-size", default="1024")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    path = args.out or folder_here() / "end_to_end.json"
    pairs = json.loads(path.read_text()) if path.exists() else []
    common = ["--data", f"image-folder:{args.folder}", "--records", args.records, "--model", args.model]
    common += ["--width", args.width, "--epochs", args.epochs, "--batch-size", args.batch_size]
    common += ["--epsilon", "8", "--delta", "1e-5"]
    for _ in range(args.rounds):
        pair = {name: timed_run([*common, *options]) for name, options in POLICIES.items()}
        ratio = pair["none"]["seconds"] / pair["dpquant"]["seconds"]
        settings = {name: getattr(args, name) for name in ("model", "width", "epochs", "batch_size")}
        pairs.append({"settings": settings, "ratio": ratio, **pair, "hardware": str(Hardware.here())})
        path.write_text(json.dumps(pairs, indent=1) + "\n")
        print(f"{args.model}, width {args.width}, {args.epochs} epochs: {ratio:.2f} times as fast", flush=True)


def timed_run(options: list[str]) -> dict:
    """Return the wall time of a run in seconds, process start included, and facts of its record and timings."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        program = str(Path(sys.executable).with_name("dpquant"))
        command = [program, "train", *options, "--out", str(out), "--json"]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        facts = json.loads((out / "record.json").read_text()) | json.loads((out / "timings.json").read_text())
    return {"seconds": seconds, **{name: facts[name] for name in KEPT}}


if __name__ == "__main__":
    main()
