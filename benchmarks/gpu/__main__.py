# SPDX-License-Identifier: Apache-2.0
"""Measures on one GPU, the most valuable first, and writes every result as soon as it is there.

    scripts/gpu [--minutes 8] [--images FILE.zip] [--out FILE.json]

Stages: the machine; tests of the GPU's kernels; exactness and speed of products of codes; whole training steps; the
main table of the paper. A stage that fails is reported, and the next one runs. Each stage is a process: after an error
of a kernel a process can no longer use its GPU.
"""

import argparse
import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import products, steps, table
from benchmarks.gpu.report import Report

# stage: the share of the time that is left when it begins
STAGES = {"tests": 0.2, "products": 0.35, "steps": 0.5, "table": 1.0}
_TESTS = ("tests/backends/test_triton.py", "tests/backends/test_conformance.py", "tests/backends/test_cuda.py")


def main() -> None:
    """Run all stages, each in a process of its own, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--images", type=Path, default=None, help="zip of GTSRB's image folders, or packed")
    parser.add_argument("--out", type=Path, default=None, help="the results [benchmarks/results/<gpu>-<date>/gpu.json]")
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=tuple(STAGES), help="only these")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the stage runs in this process
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if not torch.cuda.is_available():
        print(
            "error: Expected a GPU that torch can use; got none. Everything here is measured on one. Install a driver "
            "and a CUDA build of torch.",
            file=sys.stderr,
        )
        sys.exit(2)
    report = Report(args.out or default_path())
    if args.here:
        return run_stage(args.stage[0], report, end, args.images)
    report.put("machine", "facts", machine())
    for name in args.stage:
        left = end - time.monotonic()
        minutes = STAGES[name] * left / 60 if name != args.stage[-1] else left / 60
        print(f"{name}: at most {minutes:.1f} minutes", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--stage", name, "--minutes", f"{minutes}"]
        command += ["--out", str(report.path)] + (["--images", str(args.images)] if args.images else [])
        ended = outcome(command, 60 * minutes)
        report.put("stages", name, ended)
        print(f"{name}: {ended}", flush=True)
    print(f"wrote {report.path}")


def run_stage(name: str, report: Report, end: float, images: Path | None) -> None:
    """Run one stage in this process until about `end`, of `time.monotonic`."""
    match name:
        case "tests":
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            print(result.stdout[-4000:], result.stderr[-2000:], flush=True)
            report.put("tests", "pytest", result.stdout.strip().splitlines()[-1:] or [result.stderr[-500:]])
        case "products":
            products.run(report, end)
        case "steps":
            steps.run(report, end)
        case _:
            table.run(report, end, images)


def outcome(command: list[str], seconds: float) -> str:
    """Run a command and return how it ended, in words."""
    began = time.monotonic()
    try:
        code = subprocess.run(command, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s; what it had written is kept"
    return f"{'ended' if code == 0 else f'failed with exit code {code}'} after {time.monotonic() - began:.0f} s"


def machine() -> dict[str, object]:
    """Return the GPU's facts and the versions that decide what it runs."""
    import triton

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }


def default_path() -> Path:
    """Return benchmarks/results/<gpu>-<date>/gpu.json."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = Path(__file__).parents[1] / "results" / f"{name}-{datetime.date.today():%Y-%m-%d}"
    return folder / "gpu.json"


if __name__ == "__main__":
    main()
