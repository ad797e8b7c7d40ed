# SPDX-License-Identifier: Apache-2.0
"""Bad inputs to the command line, and the rule that each must meet: one line that says what was wrong, and no more.

`TABLE` has the inputs: a name, the command line, what its message must say, and what has to be prepared. `problems_of`
tries one. `scripts/inputs` tries all, also as processes of their own.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

Prepare = Callable[[Path], object]
TYPERS = (
    "No such",
    "Invalid value",
    "unexpected extra argument",
    "requires an argument",
    "Missing argument",
    "Missing option",
)
BAD_INPUT = 2


@dataclasses.dataclass(frozen=True)
class Bad:
    """A command line, a fragment of the message that refuses it, and what to prepare in the working directory."""

    arguments: str
    says: str
    prepare: Prepare = lambda folder: None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


# What is prepared.


def together(*parts: Prepare) -> Prepare:
    return lambda folder: [part(folder) for part in parts]


def file(name: str, content: str | bytes) -> Prepare:
    data = content.encode() if isinstance(content, str) else content

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def folder(*names: str) -> Prepare:
    return lambda home: [(home / name).mkdir(parents=True, exist_ok=True) for name in names]


def link(name: str, target: str) -> Prepare:
    return lambda home: (home / name).symlink_to(target)


def images(*places: str) -> Prepare:
    """Two grey images in each of these folders."""

    def draw(home: Path) -> None:
        for place in places:
            (home / place).mkdir(parents=True, exist_ok=True)
            for number in range(2):
                Image.new("L", (8, 8), 60 * number).save(home / place / f"{number}.png")

    return draw


def cut_image(name: str) -> Prepare:
    """The first half of an image's file."""

    def write(home: Path) -> None:
        Image.effect_noise((64, 64), 50).save(home / name)
        (home / name).write_bytes((home / name).read_bytes()[:1500])

    return write


PHOTOS = images("d/train/a", "d/train/b", "d/test/a", "d/test/b")
CHEAP = "--policy none --noise-multiplier 1 --epochs 1"  # a plan of one event, without calibration
COMPARE = "compare --policies none --noise-multiplier 1 --epochs 1"
FOLDER = f"--records 40 --batch-size 8 {CHEAP} --data image-folder:"
ON_FOLDER = f"{FOLDER}d"
ON_PHOTOS = f"{ON_FOLDER} --image-size 8 --backend simulate"


def model(source: str) -> Prepare:
    """Photos, and mm.py with a network of theirs."""
    head = "import torch\nfrom torch import nn\n\n"
    return together(PHOTOS, file("mm.py", head + source))


def network(expression: str) -> Prepare:
    return model(f"def build(num_classes=2):\n    return {expression}\n")


def config(text: str) -> Prepare:
    return file("c.toml", text)


def run_with(text: str, *more: Prepare) -> Prepare:
    return together(file("r/config.toml", text), *more)


config_of_a_run = file("r/config.toml", "")


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape) + content


def mnist(**changed: bytes) -> Prepare:
    """Four tiny files under MNIST's names, some of them replaced."""
    files = {
        "train-images": idx((2, 28, 28), bytes(2 * 784)),
        "train-labels": idx((2,), bytes(2)),
        "t10k-images": idx((1, 28, 28), bytes(784)),
        "t10k-labels": idx((1,), bytes(1)),
    } | {name.replace("_", "-"): content for name, content in changed.items()}
    stems = {name: f"m/{name}-idx{3 if name.endswith('images') else 1}-ubyte" for name in files}
    return together(*(file(stems[name], content) for name, content in files.items()))


ON_MNIST = f"train --data mnist --data-dir m {CHEAP}"

OUT_OF_RANGE = {  # option: values that are out of its range
    "epsilon": ["0", "-1", "nan", "inf", "1e-9", "1e6", "-inf"],
    "delta": ["0", "1", "nan", "-0.1", "1e-20"],
    "epochs": ["0", "-3"],
    "batch-size": ["0", "nan", "inf", "-5"],
    "sample-rate": ["2", "0", "nan", "-0.5"],
    "noise-multiplier": ["0", "-1", "nan", "inf"],
    "max-grad-norm": ["0", "inf", "-1", "nan", "1e-20"],
    "fraction": ["1.5", "-1", "nan", "0"],
    "macs": ["0", "2", "nan"],
    "beta": ["-1", "nan", "inf"],
    "ema": ["2", "nan", "0"],
    "average": ["1", "-0.1", "nan"],
    "weight-decay": ["-1", "nan", "inf"],
    "momentum": ["1", "-0.5", "nan"],
    "lr": ["0", "nan", "inf", "-1"],
    "width": ["0", "-1", "nan", "inf", "1e300"],
    "image-size": ["0", "-8", "100000"],
    "seed": ["-1", "9223372036854775808"],
    "threads": ["0", "-2", "100000"],
    "memory": ["-1", "0", "nan", "inf"],
    "microbatch-size": ["0", "-4", "385"],
    "analysis-every": ["0", "-1"],
    "analysis-repeats": ["0", "1000000"],
    "analysis-max-norm": ["0", "nan"],
    "analysis-noise-multiplier": ["0", "nan"],
    "analysis-batch-size": ["0", "nan", "1e9"],
    "checkpoint-every": ["0epochs", "often", "3", "-1steps"],
    "track": ["mlflow,", "mlflow,mlflow", "a/b"],
}
NO_SUCH_NAME = {  # verb and option: (what was meant by a name, the name)
    "plan --policy": ("rotate", "rotte"),
    "plan --optimizer": ("adam", "adamm"),
    "plan --lr-schedule": ("cosine", "cosin"),
    "plan --analysis-score": ("gradient", "gradients"),
    "plan --backend": ("simulate", "SIMULATED"),
    "plan --data": ("fashion-mnist", "fashion_mnst"),
    "train --data": ("digits", "DIGITS"),
    "train --model": ("resnet18", "resnet_18"),
    "train --track": ("tensorboard", "tensor-board"),
    "compare --policies": ("static", "statik"),
    "bench --model": ("densenet121", "densenet"),
    "assess --hardware": ("fp4", "FP-4"),
    "bench --format": ("luq-fp4", "fp4"),
    "train --format": ("luq-fp4", "fp4"),
    "plan --format": ("int4-clip", "int4"),
    "plan --rest": ("int8", "INT-8"),
}

IGNORED = [  # settings that have no effect beside others
    "--optimizer adam --momentum 0.5",
    "--optimizer adamw --momentum 0.9",
    "--policy none --fraction 0.5",
    "--policy none --macs 0.5",
    "--policy none --format int8",
    "--policy all --fraction 0.5",
    "--policy all --macs 1",
    "--policy static --beta 2",
    "--policy rotate --beta 2",
    "--policy prioritise --beta 2",
    "--policy static --ema 0.3",
    "--policy none --analysis-every 2",
    "--policy all --analysis-score loss",
    "--policy static --analysis-batch-size 8",
    "--policy rotate --analysis-noise-multiplier 2",
    "--policy static --analysis-max-norm 2",
    "--policy rotate --analysis-repeats 2",
    "--data digits --records 5000000",
    "--data mnist --records 60000",
    "--data digits --data-dir .",
    "--data image-folder:x --records 9000 --data-dir .",
    "--data table:x.csv --records 9000 --data-dir .",
    "--data table:x.csv --records 9000 --image-size 8",
    "--data text:x.csv --records 9000 --image-size 8",
    "--data digits --test x.csv",
    "--data digits --test-share 0.2",
    "--data digits --label-column y",
    "--data text:x.csv --records 9000 --spec s.toml",
    "--data table:x.csv --records 9000 --text-column t",
    "--data table:x.csv --records 9000 --classes a,b",
    "--data table:x.csv --records 9000 --tokenizer k",
    "--data table:x.csv --records 9000 --max-length 9",
    "--data packed:p --records 9000 --image-size 8",
    "--data packed:p --records 9000 --test x.csv",
    "--data packed:p --records 9000 --data-dir .",
    "--data digits --lora 4",
]

NO_NUMBER = [  # typer's own words
    "plan --epsilon abc",
    "plan --epsilon ''",
    "plan --epsilon 1,5",
    "plan --epochs 2.5",
    "plan --seed 1e3",
    "train --lr fast",
    "train --threads two",
    "compare --seeds x",
    "bench --rounds many",
    "assess --rounds 1.5",
    "assess --cost-per-hour free",
    "ledger r --delta small",
]

NO_SUCH_OPTION = [
    "--verbosely",
    "plan --epslon 3",
    "train --polcy all",
    "train --no-fix-it",
    "resume r --epochs 3",
    "ledger r --epsilon 3",
    "compare --seed-count 3",
    "bench --epochs 3",
    "assess --gpu",
]

ONE_BY_ONE = {
    "verb: unknown": Bad("trian", "Did you mean 'train'?"),
    "verb: in capitals": Bad("TRAIN", "No such command 'TRAIN'"),
    "train: an argument": Bad("train digits", "unexpected extra argument(s) (digits)"),
    "plan: a flag with a value": Bad("plan --fix true", "unexpected extra argument(s) (true)"),
    "plan: an option without its value": Bad("plan --epsilon", "requires an argument"),
    "resume: no run named": Bad("resume", "Missing argument"),
    "report: no run named": Bad("report", "Missing argument"),
    "report: not there": Bad("report nowhere", "got nowhere, which is none"),
    "report: no run": Bad("report r", "holds no record.json", folder("r")),
    "report: a run that has not ended": Bad("report r", "dpquant resume r", config_of_a_run),
    "report: half a record": Bad("report r", "a run's record", together(config_of_a_run, file("r/record.json", "{"))),
    "report: a record of another kind": Bad("report r", "a run's record", file("r/record.json", "[1]")),
    "report: out of no name": Bad("report r --out ''", "got an empty one", folder("r")),
    "verify: no run named": Bad("verify", "Missing argument"),
    "verify: not there": Bad("verify nowhere", "holds no config.toml"),
    "verify: a run that has not ended": Bad("verify r", "dpquant ledger r", config_of_a_run),
    "verify: half a record": Bad("verify r", "a run's record", together(config_of_a_run, file("r/record.json", "{"))),
    "total: no run named": Bad("total", "Missing argument"),
    "total: not there": Bad("total nowhere", "got nowhere"),
    "total: no number": Bad("total r --delta small", "Invalid value"),
    "plan: too many records of a person": Bad("plan --records-per-person 65", "records_per_person=65"),
    "config: declared words for an unknown question": Bad(
        "plan --config c.toml", "Did you mean curator?", config("[declared]\ncurater = 'me'")
    ),
    "config: a number for declared words": Bad(
        "plan --config c.toml", "declared.curator", config("[declared]\ncurator = 3")
    ),
    "config: declared words without a table": Bad("plan --config c.toml", "declared", config("declared = 'me'")),
    "ledger: no run named": Bad("ledger", "Missing argument"),
    "watch: no run named": Bad("watch", "Missing argument"),
    "watch: a file": Bad("watch f", "got f, which is a file", file("f", "")),
    "watch: a folder of other things": Bad("watch r", "r, which holds no config.toml", file("r/notes.txt", "")),
    "watch: a folder of other things, in the terminal": Bad("watch r --terminal", "holds no config", file("r/a", "")),
    "watch: once and nothing there": Bad("watch r --once", "Expected a run that has begun; got r"),
    "watch: once and an empty folder": Bad("watch r --once --json", "not there or empty", folder("r")),
    "watch: json without once": Bad("watch r --json", "Expected json with once"),
    "watch: once and terminal": Bad("watch r --once --terminal", "got both"),
    "watch: a port without a page": Bad("watch r --terminal --port 80", "got port=80"),
    "watch: a port that is none": Bad("watch r --port 65536", "Expected port in 0 .. 65535; got port=65536"),
    "watch: a negative port": Bad("watch r --port -1", "got port=-1"),
    "watch: a port in words": Bad("watch r --port http", "Invalid value"),
    "watch: a host": Bad("watch r --host 0.0.0.0", "No such option"),
    "watch: on alert": Bad("watch r --on-alert true", "No such option"),
    "explain: no such word": Bad("explain epsylon", "Did you mean epsilon?"),
    "explain: nothing near": Bad("explain xyzzy", "dpquant explain lists all words"),
    "explain: an empty word": Bad("explain ''", "Expected a word that is explained"),
    "doctor: an argument": Bad("doctor me", "unexpected extra argument"),
    # settings that contradict each other or cannot be met
    "plan: epsilon and noise": Bad("plan --epsilon 3 --noise-multiplier 1", "epsilon=3.0 and noise_multiplier=1.0"),
    "plan: fraction and macs": Bad("plan --fraction 0.5 --macs 0.5", "one of fraction and macs"),
    "plan: fraction and layers": Bad("plan --policy static --fraction 0.5 --layers 0", "one of fraction and layers"),
    "plan: layers without static": Bad("plan --layers 0", "policy=static with layers; got policy=dpquant"),
    "plan: records and sample rate": Bad(
        "plan --data image-folder:x --sample-rate 0.1 --records 100", "one of sample_rate and records"
    ),
    "train: microbatch and memory": Bad("train --microbatch-size 2 --memory 1", "one of microbatch_size and memory"),
    "plan: a batch larger than the data": Bad("plan --batch-size 5000", "at most 1442, the records"),
    "plan: epochs beyond all plans": Bad("plan --epochs 1000000000", "Expected epochs of at most 166666"),
    "plan: more records than there are people": Bad(
        "plan --data image-folder:x --records 1000000000000000000", "records=1000000000000000000"
    ),
    "plan: no records": Bad("plan --data image-folder:x --records 0", "records=0"),
    "plan: the size of a private folder": Bad("plan --data image-folder:x", "Expected records or sample_rate"),
    "plan: the analysis alone costs more": Bad(
        "plan --epsilon 0.01 --policy dpquant", "which the analysis alone costs"
    ),
    "plan: one analysis eats the budget": Bad(
        "plan --epsilon 0.5 --epochs 2 --analysis-noise-multiplier 0.2", "which the analysis alone costs"
    ),
    "plan: auto with a policy": Bad("plan --format auto --policy rotate", "Expected policy=all with format=auto"),
    "plan: auto with a share": Bad("plan --format auto --fraction 0.5", "Expected no fraction with policy=all"),
    "plan: auto with a rest": Bad("plan --format auto --rest full/luq/luq", "Expected rest=full with format=auto"),
    "plan: bandwidth between nobody": Bad("plan --bandwidth 10", "Expected world_size with bandwidth"),
    "plan: no workers": Bad("plan --world-size 0", "got world_size=0"),
    "plan: a bandwidth of nothing": Bad("plan --world-size 2 --bandwidth 0", "got bandwidth=0.0"),
    "plan: a bandwidth that is no number": Bad("plan --world-size 2 --bandwidth nan", "got bandwidth=nan"),
    "plan: workers on an unknown network": Bad("plan --world-size 2 --width 3", "dpquant assess"),
    "output: a color that is none": Bad("plan --color red", "Expected color to be one of auto, always, never"),
    "output: no color": Bad("plan --color", "Expected color to be one of"),
    "plan: two recipes": Bad("plan --rest int8/luq", "one or three recipes in rest"),
    "plan: four roles": Bad("plan --format int8,int8,int8,int8", "got format='int8,int8,int8,int8'"),
    "plan: a product in blocks": Bad("plan --format full/full/mxfp4", "wgrad"),
    "plan: no format": Bad("plan --format ''", "got format=''"),
    "plan: no data": Bad("plan --data ''", "got data=."),
    "plan: data as a file": Bad("plan --data tx.csv", "got data=tx.csv"),
    "plan: a short name of a data set": Bad("plan --data cifar", "Did you mean cifar10?"),
    "plan: a strange device": Bad("plan --device gpu", "got device=gpu"),
    "train: published data apart": Bad("train --partition range", "data of your own with partition=range"),
    "train: apart and exact": Bad(
        "train --data image-folder:d --records 100 --partition range --exact-sums", "partition=even with exact_sums"
    ),
    "train: a partition of another word": Bad("train --partition rows", "one of even, range; got partition=rows"),
    "train: a GPU that is not there": Bad("train --device cuda:97", "device=cuda:97"),
    "train: fp8 on int8": Bad("train --format fp8 --backend int8", "codes are not int8"),
    "train: resume without a run": Bad("train --resume", "Expected out with resume"),
    "train: more threads than cores can serve": Bad("train --threads 4096", "threads=4096"),
    "train: too wide for any memory": Bad("train --width 10000", "fits into the memory"),
    "train: too wide": Bad("train --width 1000", "got width=1000"),
    "train: images too large for the memory": Bad(
        f"train --data mnist {CHEAP} --image-size 16384", "got image_size=16384"
    ),
    "train: an unknown augmentation": Bad("train --augment flip", "got augment=flip"),
    "train: no view": Bad("train --augment crop --views 0", "views=0"),
    "train: views that are all the same": Bad("train --views 4", "no views with augment=none"),
    "train: no worker": Bad("train --data packed:p --workers 0", "workers=0"),
    "train: workers for records in memory": Bad("train --workers 4", "no workers with data=digits"),
    "train: a network that is not there": Bad("train --model vgg", "got model=vgg"),
    "train: a width of an own network": Bad(
        f"train {ON_PHOTOS} --model mm:build --width 2", "Expected width = 1", network("nn.Flatten()")
    ),
    "train: layers that are not there": Bad(
        f"train {ON_PHOTOS} --model mlp --policy static --layers nope", "names with 'nope'", PHOTOS
    ),
    "train: memory for nothing": Bad(f"train {ON_PHOTOS} --model mlp --memory 0.001", "got memory=0.001", PHOTOS),
    "plan: the model for no tracker": Bad("plan --track-model", "Expected no track_model with track=None"),
    "train: everything for no tracker": Bad("train --track-unsafe", "Expected no track_unsafe with track=None"),
    "compare: a tracker that is not there": Bad("compare --track nobody --out c", "got track=nobody"),
    "train: choices that are not there": Bad("train --choices nope.json", "nope.json"),
    "train: choices that are none": Bad("train --choices c.json", "c.json", file("c.json", "[1, 2")),
    # where a run goes
    "train: out of no name": Bad("train --out ''", "got an empty one"),
    "train: out in use": Bad("train --out r", "got out=r", file("r/a.txt", "mine")),
    "train: out is a file": Bad("train --out r", "got out=r", file("r", "mine")),
    "train: out in a file": Bad("train --out r/s", "got out=r/s", file("r", "mine")),
    "train: out is a link to nothing": Bad("train --out r", "got out=r", link("r", "nowhere")),
    "train: out of 300 characters": Bad(f"train --out {'x' * 300}", "xxx: File name too long"),
    "train: out among the system's": Bad("train --out /proc/dpquant", "got out=/proc/dpquant"),
    "compare: out of no name": Bad("compare --out ''", "got an empty one"),
    "audit: out of no name": Bad("audit r --out ''", "got an empty one"),
    "compare: out is a file": Bad(f"{COMPARE} --out r", "got out=r", file("r", "mine")),
    "bench: out is a folder": Bad("bench --out r", "got out=r", folder("r")),
    "bench: out in a folder that is not there": Bad("bench --out no/where.json", "got out=no/where.json"),
    # files of settings
    "config: not there": Bad("plan --config nope.toml", "got nope.toml"),
    "config: a folder": Bad("plan --config .", "got .: "),
    "config: no TOML": Bad("plan --config c.toml", "got c.toml", config("lr = = 3")),
    "config: binary": Bad("plan --config c.toml", "got c.toml", file("c.toml", b"\xff\xfe\x00")),
    "config: JSON": Bad("plan --config c.toml", "got c.toml", config('{"lr": 3}')),
    "config: a key twice": Bad("plan --config c.toml", "got c.toml", config("lr = 1\nlr = 2")),
    "config: an unknown key": Bad("plan --config c.toml", "Did you mean epsilon?", config("epsilonn = 3")),
    "config: a hyphen": Bad("plan --config c.toml", "Did you mean batch_size?", config("batch-size = 8")),
    "config: a table": Bad("plan --config c.toml", "got a table [privacy]", config("[privacy]\nepsilon = 3")),
    "config: a table of a setting's name": Bad("plan --config c.toml", "policy=", config("[policy]\nname = 'all'")),
    "config: a word for a number": Bad("plan --config c.toml", "epsilon='three'", config("epsilon = 'three'")),
    "config: a number for a word": Bad("plan --config c.toml", "model=3", config("model = 3")),
    "config: a number for a flag": Bad("plan --config c.toml", "fix=1", config("fix = 1")),
    "config: a flag for a number": Bad("plan --config c.toml", "seed=True", config("seed = true")),
    "config: a list": Bad("plan --config c.toml", "layers=['a']", config("layers = ['a']")),
    "config: a date": Bad("plan --config c.toml", "epochs=datetime", config("epochs = 2026-01-01")),
    "config: a number out of range": Bad("plan --config c.toml", "lr=-1.0", config("lr = -1.0")),
    "config: what an option contradicts": Bad(
        "plan --config c.toml --noise-multiplier 1", "epsilon=3.0 and noise_multiplier=1.0", config("epsilon = 3.0")
    ),
    "config: what is ignored": Bad(
        "plan --config c.toml", "got momentum=0.5", config("optimizer = 'adam'\nmomentum = 0.5")
    ),
    # image folders
    "folder: not named": Bad(f"train {FOLDER}", "without one"),
    "folder: not there": Bad(f"train {FOLDER}x", "x to hold train/ and test/"),
    "folder: of nobody": Bad(f"train {FOLDER}~nosuch/x", "image-folder:~nosuch"),
    "folder: a file": Bad(f"train {ON_FOLDER}", "it is a file", file("d", "")),
    "folder: empty": Bad(f"train {ON_FOLDER}", "train/ and test/ is missing", folder("d")),
    "folder: flat": Bad(f"train {ON_FOLDER}", "lie in it directly", images("d")),
    "folder: no test": Bad(f"train {ON_FOLDER}", "test/ is missing", images("d/train/a")),
    "folder: no train": Bad(f"train {ON_FOLDER}", "train/ is missing", images("d/test/a")),
    "folder: no classes": Bad(
        f"train {ON_FOLDER}", "train/ has no folder", images("d/train", "d/test")
    ),
    "folder: no classes in test": Bad(
        f"train {ON_FOLDER}", "test/ lacks a", together(images("d/train/a"), folder("d/test"))
    ),
    "folder: a class missing from test": Bad(
        f"train {ON_FOLDER}",
        "test/ lacks b, which train/ has",
        images("d/train/a", "d/train/b", "d/test/a"),
    ),
    "folder: a class missing from train": Bad(
        f"train {ON_FOLDER}",
        "train/ lacks c, which test/ has",
        images("d/train/a", "d/train/b", "d/test/a", "d/test/b", "d/test/c"),
    ),
    "folder: one class": Bad(
        f"train {ON_FOLDER}", "a is the only one", images("d/train/a", "d/test/a")
    ),
    "folder: a test image that is none": Bad(
        f"train {ON_FOLDER}", "d/test/a/9.png is not", together(PHOTOS, file("d/test/a/9.png", "no image"))
    ),
    "folder: a test image that is cut": Bad(
        f"train {ON_FOLDER}", "d/test/b/9.png is not", together(PHOTOS, cut_image("d/test/b/9.png"))
    ),
    "folder: constants of no name": Bad(f"train {ON_PHOTOS} --normalize cifar", "got normalize='cifar'", PHOTOS),
    "folder: constants without a deviation": Bad(f"train {ON_PHOTOS} --normalize 0.5", "got normalize='0.5'", PHOTOS),
    "folder: a deviation of zero": Bad(f"train {ON_PHOTOS} --normalize 0.5:0", "deviations > 0", PHOTOS),
    "folder: constants of two channels": Bad(
        f"train {ON_PHOTOS} --normalize 0.5,0.5:0.2", "each of 3 channels", PHOTOS
    ),
    "folder: constants of two lengths": Bad(
        f"train {ON_PHOTOS} --normalize 0.1,0.2,0.3:0.1,0.2", "got normalize=", PHOTOS
    ),
    "folder: parameters of a layer's name": Bad(
        f"train {ON_PHOTOS} --model mlp --train-only 1", "Did you mean 1.*?", PHOTOS
    ),
    "digits: constants of three channels": Bad("train --normalize imagenet", "each of 1 channels"),
    "pretrained: for images": Bad(f"train {ON_PHOTOS} --model hf:k", "Expected texts", PHOTOS),
    "check-model: a pretrained network that is not there": Bad("check-model hf:nowhere", "got model=hf:nowhere"),
    "check-model: a pretrained network without a vocabulary": Bad(
        "check-model hf:k", "Expected vocabulary", file("k/config.json", "{}")
    ),
    "check-model: a pretrained network of no JSON": Bad(
        "check-model hf:k", "Expected config.json", file("k/config.json", "{")
    ),
    "check-model: a tokenizer without data": Bad(
        "check-model embedding-mean --tokenizer k --tokens 8 --vocabulary 9 --classes 2", "tokenizer with data"
    ),
    "check-model: names of classes without data": Bad(
        "check-model mlp --input-shape 4 --classes a,b", "Expected a number of classes"
    ),
    "folder: no images": Bad(
        f"train {ON_FOLDER}",
        "at least one readable image",
        folder("d/train/a", "d/train/b", "d/test/a", "d/test/b"),
    ),
    "folder: no image that can be read": Bad(
        f"train {ON_FOLDER}",
        "d/train to hold at least one readable image",
        together(images("d/test/a"), file("d/train/a/0.png", "no image"), folder("d/train/b", "d/test/b")),
    ),
    "folder: no test images": Bad(
        f"train {ON_FOLDER}",
        "d/test to hold at least one readable image",
        together(images("d/train/a", "d/train/b"), folder("d/test/a", "d/test/b")),
    ),
    "folder: compared": Bad(
        f"{COMPARE} --data image-folder:x --records 40 --batch-size 8", "x to hold train/ and test/"
    ),
    "folder: assessed": Bad(f"assess {FOLDER}x", "x to hold train/ and test/"),
    # files of published data sets
    "data-dir: not there": Bad(
        f"train --data mnist --data-dir nowhere {CHEAP}", "data_dir=nowhere, which is not there"
    ),
    "data-dir: a file": Bad(f"train --data mnist --data-dir d {CHEAP}", "which is a file", file("d", "")),
    "mnist: a file that is cut": Bad(ON_MNIST, "train-images", mnist(train_images=idx((2, 28, 28), b"123"))),
    "mnist: no IDX": Bad(ON_MNIST, "train-labels", mnist(train_labels=b"labels")),
    "mnist: no images": Bad(ON_MNIST, "t10k-images", mnist(t10k_images=idx((0, 28, 28), b""))),
    "mnist: other numbers of labels": Bad(ON_MNIST, "one label for each", mnist(train_labels=idx((3,), bytes(3)))),
    "mnist: a label too high": Bad(ON_MNIST, "label", mnist(t10k_labels=idx((1,), bytes([77])))),
    "mnist: labels as images": Bad(ON_MNIST, "train-images", mnist(train_images=idx((2,), bytes(2)))),
    "mnist: a .gz that is cut": Bad(
        ON_MNIST, "readable file", together(mnist(), file("m/train-images-idx3-ubyte.gz", b"\x1f\x8b\x08"))
    ),
    # networks of the user
    "model: no module": Bad(f"train {ON_PHOTOS} --model nofile:build", "got no module nofile", PHOTOS),
    "model: no function": Bad(f"train {ON_PHOTOS} --model mm:biuld", "Did you mean build?", network("nn.Flatten()")),
    "model: a path": Bad(f"train {ON_PHOTOS} --model mm.py:build", "Did you mean mm:build?", network("nn.Flatten()")),
    "model: a longer path": Bad(f"train {ON_PHOTOS} --model ./nets/mm.py:build", "Did you mean nets.mm:build?", PHOTOS),
    "model: no module before the colon": Bad(f"train {ON_PHOTOS} --model :build", "model=:build", PHOTOS),
    "model: no function after the colon": Bad(f"train {ON_PHOTOS} --model mm:", "model=mm:", network("nn.Flatten()")),
    "model: a syntax error": Bad(f"train {ON_PHOTOS} --model mm:build", "mm.py, line 4", model("def build(:\n")),
    "model: an import that fails": Bad(
        f"train {ON_PHOTOS} --model mm:build", "No module named 'nonesuch' (at mm.py:4)", model("import nonesuch\n")
    ),
    "model: ends Python": Bad(f"train {ON_PHOTOS} --model mm:build", "SystemExit: 3 (at mm.py:4)", model("exit(3)\n")),
    "model: a variable": Bad(
        f"train {ON_PHOTOS} --model mm:build", "to name a function; got an int", model("build = 3\n")
    ),
    "model: None": Bad(f"train {ON_PHOTOS} --model mm:build", "got None", network("None")),
    "model: a class": Bad(f"train {ON_PHOTOS} --model mm:build", "got the class Linear", network("nn.Linear")),
    "model: needs more": Bad(
        f"train {ON_PHOTOS} --model mm:build", "'depth'", model("def build(depth):\n    return nn.Flatten()\n")
    ),
    "model: raises when built": Bad(
        f"train {ON_PHOTOS} --model mm:build", "got ZeroDivisionError: division by zero (at mm.py:5)", network("1 / 0")
    ),
    "model: raises in forward": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "got KeyError: 'nothing' (at mm.py:9)",
        model(
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(192, 2)\n\n"
            "    def forward(self, x):\n        return {}['nothing']\n\n\ndef build():\n    return Net()\n"
        ),
    ),
    "model: two outputs": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "got a tuple",
        model(
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(192, 2)\n\n"
            "    def forward(self, x):\n        return super().forward(x.flatten(1)), x\n\n\n"
            "def build():\n    return Net()\n"
        ),
    ),
    "model: whole numbers": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "a tensor of torch.int64",
        model(
            "class Net(nn.Linear):\n    def forward(self, x):\n"
            "        return super().forward(x.flatten(1)).long()\n\n\ndef build():\n    return Net(192, 2)\n"
        ),
    ),
    "model: too many outputs": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "gave shape (2, 7)",
        network("nn.Sequential(nn.Flatten(), nn.Linear(192, 7))"),
    ),
    "model: for other images": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "cannot be multiplied",
        network("nn.Sequential(nn.Flatten(), nn.Linear(100, 2))"),
    ),
    "model: BatchNorm": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "1 (BatchNorm2d)",
        network("nn.Sequential(nn.Conv2d(3, 2, 8), nn.BatchNorm2d(2), nn.Flatten())"),
    ),
    "model: lazy": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "1 (LazyLinear)",
        network("nn.Sequential(nn.Flatten(), nn.LazyLinear(2))"),
    ),
    "model: attention": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "(MultiheadAttention)",
        network("nn.MultiheadAttention(8, 2, add_bias_kv=True)"),
    ),
    "model: frozen": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "Expected model to have a trainable parameter",
        network("nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False)"),
    ),
    "model: couples its batch": Bad(
        f"train {ON_PHOTOS} --model mm:build",
        "depends on the rest of the batch",
        model(
            "class Centred(nn.Module):\n    def forward(self, x):\n        return x - x.mean(0)\n\n\n"
            "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2), Centred())\n"
        ),
    ),
    "model: assessed": Bad(f"assess mm:build {ON_PHOTOS}", "got ZeroDivisionError", network("1 / 0")),
    # runs to continue
    "resume: not there": Bad("resume r", "got r, which holds no config.toml"),
    "resume: of no name": Bad("resume ''", "Expected the directory of a run"),
    "resume: an empty folder": Bad("resume r", "got r, which holds no config.toml", folder("r")),
    "resume: a file": Bad("resume r", "got r, which holds no config.toml", file("r", "")),
    "resume: settings that are no TOML": Bad("resume r", "r/config.toml", run_with("= 3")),
    "resume: settings that are unknown": Bad("resume r", "got warp", run_with("warp = 3")),
    "resume: settings out of range": Bad("resume r", "lr=-1.0", run_with("lr = -1.0")),
    "train: adapters and a pattern": Bad(
        "train --data text:t.csv --model hf:m --lora 4 --train-only head.*", "Expected one of lora and train_only"
    ),
    "resume: a run that has ended, with a broken record": Bad(
        "resume r", "Expected a run's record", run_with("", file("r/record.json", "{}"))
    ),
    "resume: a run that diverged": Bad(
        "resume r", "got r, which did: after 3 steps", run_with("", file("r/diverged.txt", "after 3 steps"))
    ),
    "resume: other settings": Bad("train --resume --out r --lr 1", "Expected lr=2.0", run_with("lr = 2.0")),
    "resume: a ledger that is none": Bad(
        "resume r", "r/ledger.jsonl", run_with("epochs = 1\n", file("r/ledger.jsonl", "not a ledger\n"))
    ),
    "resume: a network that is gone": Bad("resume r", "got model=vgg", run_with("model = 'vgg'")),
    # ledgers
    "ledger: not there": Bad("ledger r", "got r. Check the path"),
    "ledger: an empty folder": Bad("ledger r", "got r. Check the path", folder("r")),
    "ledger: second one not there": Bad("ledger r s", "got s", file("r/ledger.jsonl", "")),
    # assessments, comparisons, benchmarks
    "assess: a run that is not there": Bad("assess --run nope", "nope/record.json"),
    "assess: a record that is none": Bad("assess --run r", "record", file("r/record.json", "{}")),
    "assess: fewer than no runs": Bad("assess --runs-per-month -1", "runs_per_month=-1.0"),
    "assess: a machine that pays": Bad("assess --cost-per-hour -1", "cost_per_hour=-1.0"),
    "assess: nothing a number of times": Bad("assess --runs-per-month nan", "runs_per_month=nan"),
    "assess: no rounds": Bad("assess --rounds 0", "rounds=0"),
    "assess: rounds without end": Bad("assess --rounds 1000000000", "rounds=1000000000"),
    "assess: an unknown network": Bad("assess foo", "got model=foo"),
    "assess: other layers quantized": Bad("assess --rest int8", "got rest=int8"),
    "assess: two networks": Bad("assess cnn lenet", "unexpected extra argument(s) (lenet)"),
    "compare: no policies": Bad("compare --policies ''", "got 0 policies"),
    "compare: commas alone": Bad("compare --policies ,,", "got 0 policies"),
    "compare: a policy twice": Bad("compare --policies none,none", "policies=none,none"),
    "compare: no seeds": Bad("compare --seeds 0", "seeds=0"),
    "compare: seeds without end": Bad("compare --seeds 1000000000", "seeds=1000000000"),
    "compare: one policy": Bad("compare --policy none", "Expected no policy for compare"),
    "compare: one seed": Bad("compare --seed 3", "got seed=3"),
    "compare: an unknown network": Bad(f"{COMPARE} --model foo", "got model=foo"),
    "bench: no rounds": Bad("bench --rounds 0", "rounds=0"),
    "bench: no batch": Bad("bench --batch-size 0", "batch_size=0"),
    "bench: a batch without end": Bad("bench --batch-size 1000000000", "batch_size=1000000000"),
    "bench: no threads": Bad("bench --threads 0", "threads=0"),
    "bench: an image of a point": Bad("bench --image-size 1", "image_size=1"),
    "bench: an image without end": Bad("bench --image-size 100000", "image_size=100000"),
    "bench: images too large for the memory": Bad("bench --image-size 4096 --batch-size 4096", "image_size=4096"),
    "bench: images for a table": Bad("bench --model mlp --image-size 32", "model=mlp, image_size=32"),
    "bench: a GPU that is not there": Bad("bench --device cuda:97", "device=cuda:97"),
    "bench: a strange device": Bad("bench --device gpu", "device=gpu"),
}  # fmt: skip

SPEC = """task = "classification"
classes = ["no", "yes"]
[columns.a]
kind = "number"
range = [0, 9]
[columns.b]
kind = "category"
values = ["u", "v"]
other = false
"""
RARE, REGRESSION = (
    SPEC.replace('task = "classification"', 'task = "rare positives"'),
    SPEC.replace('task = "classification"\nclasses = ["no", "yes"]', 'task = "regression"'),
)
CSV = "a,b,y\n" + "1,u,no\n2,v,yes\n" * 10
JSONL = '{"t": "one two", "y": "no"}\n{"t": "two", "y": "yes"}\n' * 10
TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "one": 1, "two": 2}, "unk_token": "[UNK]"}}"""
OWN = f"train --records 20 --batch-size 8 {CHEAP} --backend simulate"
ON_TABLE = f"{OWN} --data table:t.csv --label-column y --spec s.toml --test e.csv"
ON_TEXTS = f"{OWN} --data text:t.jsonl --text-column t --label-column y --classes no,yes --tokenizer k --test e.jsonl"


def table(spec: str = SPEC, train: str | bytes = CSV, test: str | bytes = CSV, *more: Prepare) -> Prepare:
    return together(file("s.toml", spec), file("t.csv", train), file("e.csv", test), *more)


def texts(train: str | bytes = JSONL, test: str | bytes = JSONL, tokenizer: str = TOKENIZER, *more: Prepare) -> Prepare:
    return together(file("t.jsonl", train), file("e.jsonl", test), file("k/tokenizer.json", tokenizer), *more)


def packed() -> Prepare:
    """A manifest of rows, without its file, which has 4 bytes."""
    manifest = """{"format": 1, "note": "", "kind": "rows", "num_classes": 2, "input_shape": [6], "categories": [],
    "class_names": ["a", "b"], "task": {}, "vocabulary": null, "padding": null, "facts": {}, "reading": {},
    "files": {"train/inputs.npy": {"bytes": 4, "sha256": "00"}}}"""
    return file("p/manifest.json", manifest)


def column(line: str, *, of: str = "a") -> Prepare:
    """A table whose spec has this line in place of what it says of a column."""
    kept = {"a": SPEC.replace('kind = "number"\nrange = [0, 9]', line), "b": SPEC.split("[columns.b]")[0] + line}
    return table(kept[of])


SOURCES = {
    # tables
    "table: not named": Bad(f"{OWN} --data table:", "without one"),
    "table: not there": Bad(ON_TABLE, "t.csv to be a file of records; it is not there", file("s.toml", SPEC)),
    "table: a folder": Bad(ON_TABLE, "it is a folder", together(file("s.toml", SPEC), folder("t.csv"))),
    "table: of another kind": Bad(f"{ON_TABLE} --data table:t.xlsx", "got t.xlsx", table()),
    "table: no label column": Bad(
        f"{OWN} --data table:t.csv --spec s.toml --test e.csv", "Expected label_column", table()
    ),
    "table: no spec": Bad(f"{OWN} --data table:t.csv --label-column y --test e.csv", "Expected spec", table()),
    "table: no test": Bad(
        f"{OWN} --data table:t.csv --label-column y --spec s.toml", "Expected test or test_share", table()
    ),
    "table: two tests": Bad(f"{ON_TABLE} --test-share 0.2", "one of test and test_share", table()),
    "table: no size": Bad("plan --data table:t.csv", "Expected records or sample_rate"),
    "table: a label that is no column": Bad(f"{ON_TABLE} --label-column Y", "Did you mean y?", table()),
    "table: a label among the columns": Bad(f"{ON_TABLE} --label-column a", "no column a in the spec", table()),
    "table: empty": Bad(ON_TABLE, "line of column names", table(SPEC, "")),
    "table: a header alone": Bad(ON_TABLE, "at least one record; it holds none", table(SPEC, "a,b,y\n")),
    "table: a column too many": Bad(ON_TABLE, "describe column c", table(SPEC, "a,b,c,y\n1,u,0,no\n")),
    "table: a column too few": Bad(ON_TABLE, "to have column b", table(SPEC, "a,y\n1,no\n")),
    "table: a column twice": Bad(ON_TABLE, "got a twice", table(SPEC, "a,b,a,y\n1,u,1,no\n")),
    "table: UTF-16": Bad(ON_TABLE, "to be UTF-8 text", table(SPEC, CSV.encode("utf-16"))),
    "table: quotes that do not close": Bad(ON_TABLE, "t.csv to be a whole file", table(SPEC, CSV + '"1,u,no\n')),
    "table: words alone in a column of numbers": Bad(
        ON_TABLE, "at least one record, for", table(SPEC, "a,b,y\nx,u,no\n")
    ),
    "table: words in a column of numbers of the test": Bad(
        ON_TABLE, "column a of record 2", table(SPEC, CSV, "a,b,y\n1,u,no\nx,u,no\n")
    ),
    "table: a category that the test alone has": Bad(
        ON_TABLE, "column b of record 1", table(SPEC, CSV, "a,b,y\n1,w,no\n")
    ),
    "table: a class that the test alone has": Bad(
        ON_TABLE, "column y of record 1", table(SPEC, CSV, "a,b,y\n1,u,so\n")
    ),
    "table: a field too few in the test": Bad(ON_TABLE, "many fields of record 1", table(SPEC, CSV, "a,b,y\n1,u\n")),
    "table: Latin-1 in the test": Bad(ON_TABLE, "column b of record 1", table(SPEC, CSV, b"a,b,y\n1,\xfc,no\n")),
    "table: Parquet that is none": Bad(
        f"{ON_TABLE} --data table:t.parquet",
        "t.parquet to be a whole file",
        table(SPEC, CSV, CSV, file("t.parquet", "no")),
    ),
    "table: a test of another kind": Bad(f"{ON_TABLE} --test e.json", "got e.json", table()),
    "table: a share of all": Bad(f"{OWN} --data table:t.csv --test-share 1", "test_share=1.0"),
    "table: one class where positives are rare": Bad(
        f"{ON_TABLE} --model mlp --width 0.02",
        "both classes",
        table(RARE.replace("[columns.a]", "prior = 0.1\n[columns.a]", 1), CSV, "a,b,y\n1,u,no\n"),
    ),
    "table: a network of images": Bad(f"{ON_TABLE} --model cnn", "Expected images for model=cnn", table()),
    "table: a network of texts": Bad(
        f"{ON_TABLE} --model embedding-mean", "Expected texts for model=embedding-mean", table()
    ),
    "table: a pretrained network": Bad(f"{ON_TABLE} --model hf:k", "Expected texts", table()),
    "table: adapters": Bad(f"{ON_TABLE} --lora 4", "Expected no lora with model=mlp", table()),
    "table: parameters that are not there": Bad(f"{ON_TABLE} --train-only head*", "head* matches none", table()),
    "table: compared in a regression": Bad(
        f"compare {ON_TABLE[6:].replace('--policy none', '')} --policies none",
        "got a regression",
        table(REGRESSION.replace("[columns.a]", "range = [0, 1]\n[columns.a]", 1)),
    ),
    "table: assessed without a spec": Bad("assess --data table:t.csv --label-column y --records 20", "Expected spec"),
    "table: a model checked for it without a spec": Bad("check-model mlp --data table:t.csv", "Expected spec"),
    "table: UTF-16 without its mark": Bad(ON_TABLE, "begins as UTF-16 does", table(SPEC, CSV.encode("utf-16-le"))),
    "table: an empty value in the test": Bad(
        ON_TABLE, "an empty value in column a of record 1", table(SPEC, CSV, "a,b,y\n,u,no\n")
    ),
    "table: a file of zero bytes": Bad(ON_TABLE, "begins as UTF-16 does", table(SPEC, b"\0" * 64)),
    "table: another separator": Bad(ON_TABLE, "a header with ';'", table(SPEC, CSV.replace(",", ";"))),
    "table: constants of pixels": Bad(f"{ON_TABLE} --normalize imagenet", "Tables and texts are no images", table()),
    "table: not in its resumed place": Bad(
        "resume r",
        "t.csv to be a file",
        run_with(
            'data = "table:t.csv"\nrecords = 20\nlabel_column = "y"\nspec = "s.toml"\ntest = "e.csv"\n'
            'policy = "none"\nnoise_multiplier = 1.0\nbatch_size = 8.0\n',
            file("s.toml", SPEC),
        ),
    ),
    # specs
    "spec: not there": Bad(ON_TABLE, "got s.toml", file("t.csv", CSV)),
    "spec: no TOML": Bad(ON_TABLE, "got s.toml", table("= 3")),
    "spec: a draft": Bad(ON_TABLE, "a draft", table("draft = true\n" + SPEC)),
    "spec: no task": Bad(ON_TABLE, "task of s.toml", table(SPEC.split("\n", 1)[1])),
    "spec: a task that is none": Bad(ON_TABLE, "Did you mean classification?", table(SPEC.replace("fication", "fy"))),
    "spec: no columns": Bad(ON_TABLE, "to describe columns", table(SPEC.split("[")[0] + '["no", "yes"]')),
    "spec: all columns ignored": Bad(
        ON_TABLE,
        "that is not ignored",
        table(SPEC.split("[columns.a]")[0] + '[columns.a]\nkind = "ignored"\n[columns.b]\nkind = "ignored"\n'),
    ),
    "spec: a column in capitals": Bad(ON_TABLE, "Did you mean A?", table(SPEC.replace("columns.a", "columns.A"))),
    "spec: an unknown key": Bad(ON_TABLE, "Did you mean classes?", table(SPEC.replace("classes", "klasses"))),
    "spec: one class": Bad(ON_TABLE, "two classes or more", table(SPEC.replace('"no", ', ""))),
    "spec: no classes": Bad(ON_TABLE, "classes of s.toml", table(SPEC.replace('["no", "yes"]', "3"))),
    "spec: a class twice": Bad(ON_TABLE, "got 'no' twice", table(SPEC.replace('"yes"', '"no"'))),
    "spec: rare positives of three classes": Bad(
        ON_TABLE, "two classes, the rare", table(RARE.replace('"no"', '"no", "so"'))
    ),
    "spec: rare positives without a prior": Bad(ON_TABLE, "Expected a prior", table(RARE)),
    "spec: a prior that is none": Bad(
        ON_TABLE, "prior=2", table(RARE.replace("[columns.a]", "prior = 2\n[columns.a]", 1))
    ),
    "spec: a regression without a range": Bad(ON_TABLE, "range of s.toml", table(REGRESSION)),
    "spec: a column that is no table": Bad(
        ON_TABLE,
        "to be a table with a kind",
        table('task = "classification"\nclasses = ["no", "yes"]\n[columns]\na = "number"\nb = "number"\n'),
    ),
    "spec: a kind that is none": Bad(ON_TABLE, "Did you mean number?", column('kind = "numbers"')),
    "spec: a number without a range": Bad(ON_TABLE, "range of column a", column('kind = "number"')),
    "spec: a range from high to low": Bad(ON_TABLE, "got [9, 0]", column('kind = "number"\nrange = [9, 0]')),
    "spec: a range without an end": Bad(ON_TABLE, "got [0, inf]", column('kind = "number"\nrange = [0, inf]')),
    "spec: a range of dates that are none": Bad(ON_TABLE, "two dates", column('kind = "date"\nrange = [0, 99]')),
    "spec: a range of words": Bad(ON_TABLE, "got ['low', 'high']", column('kind = "number"\nrange = ["low", "high"]')),
    "spec: a scale that is none": Bad(
        ON_TABLE, "scale of column a", column('kind = "number"\nrange = [0, 9]\nscale = "sqrt"')
    ),
    "spec: values of a number": Bad(ON_TABLE, "got values", column('kind = "number"\nrange = [0, 9]\nvalues = ["u"]')),
    "spec: a category without values": Bad(
        ON_TABLE, "values of column b", column('[columns.b]\nkind = "category"', of="b")
    ),
    "spec: a category of no values": Bad(
        ON_TABLE, "at least one category", column('[columns.b]\nkind = "category"\nvalues = []', of="b")
    ),
    "spec: a category twice": Bad(
        ON_TABLE, "got 'u' twice", column('[columns.b]\nkind = "category"\nvalues = ["u", "u"]', of="b")
    ),
    "spec: a value that is missing": Bad(
        ON_TABLE, "'u' in both", column('[columns.b]\nkind = "category"\nvalues = ["u"]\nmissing = ["u"]', of="b")
    ),
    "spec: a word for a flag": Bad(
        ON_TABLE, "got 'no'", column('[columns.b]\nkind = "category"\nvalues = ["u"]\nother = "no"', of="b")
    ),
    # drafts of specs
    "init: a table that is not there": Bad("init --table t.csv --label-column y", "t.csv to be a file"),
    "init: a label that is no column": Bad(
        "init --table t.csv --label-column z", "to have the label_column z", table()
    ),
    "init: a file in the way": Bad("init --table t.csv --label-column y --out s.toml", "which exists", table()),
    "init: a folder that is not there": Bad("init --table t.csv --label-column y --out n/s.toml", "not there", table()),
    "init: no label of a table": Bad("init --table t.csv", "Expected label_column", table()),
    "init: settings of a table": Bad("init --table t.csv --label-column y --lr 1", "got lr=1", table()),
    "init: settings in the way": Bad("init", "which exists", file("config.toml", "")),
    "init: settings of no run": Bad("init --epochs 0", "epochs=0"),
    "config: a wrong value in line 3": Bad(
        "plan --config c.toml", "line 3 of c.toml", file("c.toml", "# mine\nlr = 1.0\nepochs = 0\n")
    ),
    "config: an unknown name in line 2": Bad(
        "train --config c.toml", "line 2 of c.toml", file("c.toml", "lr = 1.0\nepohcs = 3\n")
    ),
    # texts
    "texts: not named": Bad(f"{OWN} --data text: --tokenizer k --test e.jsonl", "without one"),
    "texts: not there": Bad(f"{ON_TEXTS} --data text:u.jsonl", "u.jsonl to be a file", texts()),
    "texts: of another kind": Bad(f"{ON_TEXTS} --data text:u.txt", "got u.txt", texts()),
    "texts: no column": Bad(
        f"{OWN} --data text:t.jsonl --label-column y --classes no,yes --tokenizer k --test e.jsonl",
        "Expected text_column",
        texts(),
    ),
    "texts: no label": Bad(
        f"{OWN} --data text:t.jsonl --text-column t --classes no,yes --tokenizer k --test e.jsonl",
        "Expected label_column",
        texts(),
    ),
    "texts: no classes": Bad(
        f"{OWN} --data text:t.jsonl --text-column t --label-column y --tokenizer k --test e.jsonl",
        "Expected classes",
        texts(),
    ),
    "texts: one class": Bad(f"{ON_TEXTS} --classes no", "got classes=no", texts()),
    "texts: a class twice": Bad(f"{ON_TEXTS} --classes no,no", "got classes=no,no", texts()),
    "texts: three columns": Bad(f"{ON_TEXTS} --text-column a,b,c", "got text_column=a,b,c", texts()),
    "texts: no tokenizer": Bad(
        f"{OWN} --data text:t.jsonl --text-column t --label-column y --classes no,yes --test e.jsonl",
        "Expected tokenizer",
        texts(),
    ),
    "texts: a tokenizer that is not there": Bad(f"{ON_TEXTS} --tokenizer n", "got tokenizer=n", texts()),
    "texts: a tokenizer that is none": Bad(ON_TEXTS, "k/tokenizer.json to be a tokenizer", texts(JSONL, JSONL, "{}")),
    "texts: a folder without a tokenizer": Bad(
        f"{ON_TEXTS} --tokenizer d", "got tokenizer=d", texts(JSONL, JSONL, TOKENIZER, folder("d"))
    ),
    "texts: views": Bad(f"{ON_TEXTS} --augment crop", "no augment with data=text:", texts()),
    "texts: no length": Bad(f"{ON_TEXTS} --max-length 0", "max_length=0", texts()),
    "texts: a key that no line has": Bad(f"{ON_TEXTS} --text-column u", "the key u; none has", texts()),
    "texts: no lines": Bad(ON_TEXTS, "at least one record", texts("")),
    "texts: no JSON": Bad(ON_TEXTS, "to be a JSON object; none is", texts("one\ntwo\n")),
    "texts: all empty": Bad(ON_TEXTS, "at least one record", texts('{"t": "", "y": "no"}\n')),
    "texts: labels in no list": Bad(f"{ON_TEXTS} --classes a,b", "e.jsonl to have a text", texts()),
    "texts: an empty one in the test": Bad(
        ON_TEXTS, "an empty text in record 1", texts(JSONL, '{"t": "", "y": "no"}\n')
    ),
    "texts: a label in no list in the test": Bad(
        ON_TEXTS, "none of them in record 1", texts(JSONL, '{"t": "one", "y": "so"}\n')
    ),
    "texts: no JSON in the test": Bad(
        ON_TEXTS, "cannot be read, or lacks a column in record 21", texts(JSONL, JSONL + "one\n")
    ),
    "texts: Latin-1 in the test": Bad(ON_TEXTS, "not UTF-8 in record 1", texts(JSONL, b'{"t": "\xfc", "y": "no"}\n')),
    "texts: a CSV without the column": Bad(
        f"{ON_TEXTS} --data text:t.csv", "to have a column t", texts(JSONL, JSONL, TOKENIZER, file("t.csv", CSV))
    ),
    "texts: a CSV in UTF-16": Bad(
        f"{ON_TEXTS} --data text:t.csv",
        "to be UTF-8",
        texts(JSONL, JSONL, TOKENIZER, file("t.csv", CSV.encode("utf-16"))),
    ),
    "texts: a network of images": Bad(f"{ON_TEXTS} --model cnn", "Expected images for model=cnn", texts()),
    "texts: a network of tables": Bad(f"{ON_TEXTS} --model mlp", "for model=mlp; got texts", texts()),
    "texts: a network that is not there": Bad(f"{ON_TEXTS} --model hf:nowhere", "got model=hf:nowhere", texts()),
    "texts: a folder that is no network": Bad(
        f"{ON_TEXTS} --model hf:m",
        "Expected m to hold a network",
        texts(JSONL, JSONL, TOKENIZER, file("m/config.json", "{}")),
    ),
    "texts: a pretrained network with a width": Bad(
        f"{ON_TEXTS} --model hf:m --width 2", "no width", texts(JSONL, JSONL, TOKENIZER, file("m/config.json", "{}"))
    ),
    "texts: adapters of no rank": Bad(f"{ON_TEXTS} --model hf:m --lora 0", "lora=0", texts()),
    # packed records
    "pack: no source": Bad("pack", "Expected a source and a folder"),
    "pack: nowhere to write": Bad("pack digits", "Expected a source and a folder"),
    "pack: an empty place": Bad("pack digits ''", "an empty one"),
    "pack: a folder in the way": Bad("pack digits p", "which exists", folder("p")),
    "pack: a folder that is not there": Bad("pack digits n/p", "not there"),
    "pack: an unknown source": Bad("pack digit p", "Did you mean digits?"),
    "pack: a folder without images": Bad("pack image-folder:n p", "it is not there"),
    "pack: an option of another source": Bad("pack image-folder:n p --spec s.toml", "Only tables have it"),
    "pack: a table without a spec": Bad("pack table:t.csv p --label-column y --test e.csv", "Expected spec", table()),
    "pack: a table without records": Bad(
        "pack table:t.csv p --label-column y --spec s.toml --test e.csv", "it holds none", table(SPEC, "a,b,y\n")
    ),
    "pack: packed records": Bad("pack packed: p", "without one"),
    "pack: verify beside a source": Bad("pack digits --verify p", "verify alone"),
    "pack: verify nothing": Bad("pack --verify p", "holds no manifest.json"),
    "packed: not named": Bad(f"{OWN} --data packed:", "without one"),
    "packed: not there": Bad(f"{OWN} --data packed:p", "holds no manifest.json"),
    "packed: a file": Bad(f"{OWN} --data packed:p", "holds no manifest.json", file("p", "")),
    "packed: no size": Bad("plan --data packed:p", "Expected records or sample_rate"),
    "packed: a manifest that is none": Bad(
        f"{OWN} --data packed:p", "manifest of format 1", file("p/manifest.json", "{}")
    ),
    "packed: a manifest that is no JSON": Bad(
        f"{OWN} --data packed:p", "manifest of format 1", file("p/manifest.json", "{")
    ),
    "packed: a file is missing": Bad(
        f"{OWN} --data packed:p", "p/train/inputs.npy to be as its manifest.json says", packed()
    ),
    "packed: a file of another size": Bad(
        f"{OWN} --data packed:p", "it has another size", together(packed(), file("p/train/inputs.npy", "other"))
    ),
    "packed: a file of the same size": Bad(
        "pack --verify p", "its content has changed", together(packed(), file("p/train/inputs.npy", "same"))
    ),
    "packed: a file that is no array": Bad(
        f"{OWN} --data packed:p", "array as dpquant pack writes", together(packed(), file("p/train/inputs.npy", "same"))
    ),
    "packed: assessed": Bad("assess --data packed:p --records 9000", "holds no manifest.json"),
    "packed: a model checked for it in another size": Bad(
        "check-model cnn --data packed:p --image-size 8", "no image_size with data=packed:p"
    ),
    "packed: a model checked for nothing": Bad("check-model cnn --data packed:p", "holds no manifest.json"),
    "packed: not in its resumed place": Bad(
        "resume r",
        "holds no manifest.json",
        run_with('data = "packed:p"\nrecords = 20\npolicy = "none"\nnoise_multiplier = 1.0\nbatch_size = 8.0\n'),
    ),
    "texts: assessed without a tokenizer": Bad(f"assess {ON_TEXTS[6:]} --tokenizer n", "got tokenizer=n", texts()),
    "texts: a test that is not there": Bad(f"{ON_TEXTS} --test f.jsonl", "f.jsonl to be a file", texts()),
    "texts: a misspelt key": Bad(f"{ON_TEXTS} --label-column yy", "Did you mean y?", texts()),
    "texts: JSON lines in UTF-16": Bad(ON_TEXTS, "begins as UTF-16 does", texts(JSONL.encode("utf-16"))),
    "texts: a CSV under the name of JSON lines": Bad(ON_TEXTS, "to be a JSON object; none is", texts(CSV)),
    "texts: one JSON list": Bad(ON_TEXTS, "to be a JSON object; none is", texts(f"[{JSONL.splitlines()[0]}]")),
    "texts: a misspelt column": Bad(
        f"{ON_TEXTS} --data text:t.csv --text-column bb",
        "Did you mean b?",
        texts(JSONL, JSONL, TOKENIZER, file("t.csv", CSV)),
    ),
    "texts: a pretrained network without its tokens": Bad(f"{ON_TEXTS} --model hf:k/m", "got model=hf:k/m", texts()),
    "texts: a function for patterns of nothing": Bad(
        f"{ON_TEXTS} --train-only hidden", "Did you mean hidden.*?", texts()
    ),
    "texts: constants of pixels": Bad(f"{ON_TEXTS} --normalize imagenet", "Tables and texts are no images", texts()),
}


FIXTURES = Path(__file__).parent / "runs" / "fixtures"


def ended(**changed: str | None) -> Prepare:
    """A run that has ended, by its record, without a model; some files replaced, or left out where None is given."""
    files = {
        "config.toml": "",
        "record.json": (FIXTURES / "record-4.json").read_text(),
        "model.json": (FIXTURES / "model-2.json").read_text(),
    } | {name.replace("_", "."): content for name, content in changed.items()}
    return together(*(file(f"r/{name}", content) for name, content in files.items() if content is not None))


_NEWER = ended(model_json='{"schema": 99}')
AFTER_TRAINING = {
    f"{verb}: {name}": Bad(line.format("r"), says, prepare)
    for verb, line in {
        "evaluate": "evaluate {}",
        "predict": "predict {} x.png",
        "export --to": "export {} --to safetensors --out f",
    }.items()
    for name, says, prepare in (
        ("not there", "directory of a run", folder()),
        ("an empty folder", "directory of a run", folder("r")),
        ("a file", "directory of a run", file("r", "")),
        ("a run that was killed", "dpquant resume r", config_of_a_run),
        ("half a record", "a run's record", ended(record_json="{")),
        ("a record of a newer schema", "schema=99", ended(record_json='{"schema": 99}')),
        ("no model", "model.safetensors", ended()),
    )
}
AFTER_TRAINING |= {
    "evaluate: no run named": Bad("evaluate", "Missing argument"),
    "predict: no run named": Bad("predict", "Missing argument"),
    "predict: no file named": Bad("predict r", "Missing argument"),
    "export: no run named": Bad("export", "Missing argument"),
    "evaluate: a run that diverged": Bad("evaluate r", "It diverged", run_with("", file("r/diverged.txt", "why"))),
    "evaluate: another model": Bad("evaluate r", "to have the SHA-256", ended(model_safetensors="other")),
    "evaluate: no description": Bad("evaluate r", "it holds none", ended(model_json=None)),
    "predict: no description": Bad("predict r x.png", "it holds none", ended(model_json=None)),
    "predict: half a description": Bad("predict r x", "to describe a run's model", ended(model_json="{")),
    "predict: a newer description": Bad("predict r x", "schema 99", _NEWER),
    "predict: another model": Bad("predict r x.png", "to have the SHA-256", ended(model_safetensors="other")),
    "predict: top as a word": Bad("predict r x.png --top all", "Invalid value"),
    "evaluate: epsilon as a word": Bad("evaluate r --test-epsilon low", "Invalid value"),
    "evaluate: a number without epsilon": Bad("evaluate r --test-records 9", "Expected no test_records", ended()),
    "evaluate: epsilon without a number": Bad("evaluate r --test-epsilon 1", "Expected test_records", ended()),
    "evaluate: epsilon of zero": Bad("evaluate r --test-epsilon 0 --test-records 9", "test_epsilon=0.0", ended()),
    "evaluate: infinite epsilon": Bad("evaluate r --test-epsilon inf --test-records 9", "test_epsilon=inf", ended()),
    "evaluate: nan": Bad("evaluate r --test-epsilon nan --test-records 9", "test_epsilon=nan", ended()),
    "evaluate: no records": Bad("evaluate r --test-epsilon 1 --test-records 0", "test_records=0", ended()),
    "export: nowhere": Bad("export r", "Expected a folder, or to and out", ended()),
    "export: a folder and a file": Bad("export r d --to pt2 --out f", "Expected a folder, or to and out", ended()),
    "export: no format": Bad("export r --out f", "Expected a folder, or to and out", ended()),
    "export: no file": Bad("export r --to pt2", "Expected a folder, or to and out", ended()),
    "export: an unknown format": Bad("export r --to onyx --out f", "Did you mean onnx?", ended()),
    "export: a file that is there": Bad(
        "export r --to pt2 --out f", "which is there", together(ended(), file("f", ""))
    ),
    "export: a folder that is not there": Bad("export r --to pt2 --out no/f", "is not there", ended()),
    "export: out of no name": Bad("export r --to pt2 --out ''", "got an empty one", ended()),
}


def _table() -> dict[str, Bad]:
    table = {**ONE_BY_ONE, **SOURCES, **AFTER_TRAINING}
    for option, values in OUT_OF_RANGE.items():
        name = option.replace("-", "_").removeprefix("analysis_") if "analysis" in option else option.replace("-", "_")
        for value in values:
            table[f"plan: {option} {value}"] = Bad(f"plan --{option} {value}", f"{name}=")
    for option, (meant, name) in NO_SUCH_NAME.items():
        table[f"{option} {name}"] = Bad(f"{option} {name}", f"Did you mean {meant}?")
    for settings in IGNORED:
        last, value = settings.split()[-2:]
        table[f"ignored: {settings}"] = Bad(f"plan {settings}", f"Expected no {last[2:].replace('-', '_')} with ")
    for line in NO_NUMBER:
        table[f"no number: {line}"] = Bad(line, "Invalid value for '--")
    for line in NO_SUCH_OPTION:
        table[f"no option: {line}"] = Bad(line, "No such option: --")
    return table


TABLE = _table()


# The rule, and how it is tried.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int | None
    out: str
    err: str
    raised: str = ""


Run = Callable[[list[str]], int]


@contextlib.contextmanager
def working_in(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Context: the working directory and some environment variables; modules that were imported there are forgotten."""
    before, variables, known = Path.cwd(), dict(os.environ), set(sys.modules)
    keeps, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    os.chdir(folder)
    os.environ.update(environment)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)
        sys.dont_write_bytecode = keeps
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def in_process(run: Run) -> Callable[[Bad, Path], Outcome]:
    """Return a function that runs a command line here, by a function like `dpquant.app.cli.run`."""

    def tried(bad: Bad, folder: Path) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with working_in(folder, bad.environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code, raised = run(shlex.split(bad.arguments)), ""
            except BaseException as error:
                code, raised = None, f"{type(error).__name__}: {error}"
        return Outcome(code, out.getvalue(), err.getvalue(), raised)

    return tried


def as_process(bad: Bad, folder: Path, out: str = "") -> Outcome:
    """Run a command line as a user does, with its standard output in a file if one is named."""
    command = [sys.executable, "-m", "dpquant", *shlex.split(bad.arguments)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **bad.environment}
    with contextlib.ExitStack() as files:
        stdout = files.enter_context(open(out, "w")) if out else subprocess.PIPE
        result = subprocess.run(
            command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    return Outcome(result.returncode, result.stdout or "", result.stderr)


# what `train` says of a run before it looks at the records, and so before some refusals
PROGRESS = ("data      ", "training  ", "privacy   ", "loading ", "checking ", "measuring ", "trying ")


def problems_of(bad: Bad, folder: Path, tried: Callable[[Bad, Path], Outcome]) -> list[str]:
    """Return in what a command line was not refused as it should be: by one line, and nothing else."""
    bad.prepare(folder)
    before = contents(folder)
    found = tried(bad, folder)
    lines = [line for line in found.err.splitlines() if not line.startswith(PROGRESS)]
    message = lines[0] if lines else ""
    rules = {
        f"raised {found.raised}": not found.raised,
        f"exit code {found.code}": found.code == BAD_INPUT,
        f"on standard output: {found.out!r}": not found.out,
        f"{len(lines)} lines on standard error: {found.err!r}": len(lines) == 1 and found.err.endswith("\n"),
        f"no error: {message!r}": message.startswith("error: "),
        f"words of its own: {message!r}": "Expected" in message or any(words in message for words in TYPERS),
        f"does not say {bad.says!r}: {message!r}": bad.says in message,
        f"files were changed: {changes(before, contents(folder))}": contents(folder) == before,
    }
    return [problem for problem, holds in rules.items() if not holds]


def contents(folder: Path) -> dict[str, bytes]:
    """Return {path: content} of all that lies in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def processor_seconds() -> float:
    """Return the processor time of this process and its children so far: on a busy machine a clock says little."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Tried(NamedTuple):
    """What was found of a bad input: what is wrong with its refusal, and the processor time that it took."""

    problems: list[str]
    seconds: float


def try_one(name: str, run: Run | None = None) -> Tried:
    """Try a bad input: by a function like `dpquant.app.cli.run`, or without one as a process of its own."""
    began = processor_seconds()
    with tempfile.TemporaryDirectory() as place:
        problems = problems_of(TABLE[name], Path(place), in_process(run) if run else as_process)
    return Tried(problems, processor_seconds() - began)


def main() -> int:
    """Try every bad input, or those whose name has a word in it, and print a summary."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("words", nargs="*", help="only inputs with one of these words in their name")
    parser.add_argument(
        "--processes", action="store_true", help="each as a process of its own, one a core; takes minutes"
    )
    given = parser.parse_args()
    from dpquant.app.cli import run

    chosen = [name for name in TABLE if not given.words or any(word in name for word in given.words)]
    if given.processes:
        with concurrent.futures.ProcessPoolExecutor() as pool:
            found = dict(zip(chosen, pool.map(try_one, chosen), strict=True))
    else:
        found = {name: try_one(name, run) for name in chosen}
    wrong = [name for name in chosen if found[name].problems]
    for name in wrong:
        for problem in found[name].problems:
            print(f"{name}: {problem}", flush=True)
    slowest = max(chosen, key=lambda name: found[name].seconds, default=None)
    print(f"{len(chosen)} bad inputs tried, {len(chosen) - len(wrong)} refused in one line, {len(wrong)} not.")
    if slowest is not None:
        total, longest = sum(one.seconds for one in found.values()), found[slowest].seconds
        print(f"{total:.1f} s of processor time, imports included; the slowest took {longest:.1f} s: {slowest}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
