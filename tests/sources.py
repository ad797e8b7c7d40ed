# SPDX-License-Identifier: Apache-2.0
"""Small tables, texts and images in files, and the settings of tiny runs on them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train
from mechanisms import repeating
from words import bert_in, tokenizer_in

SPEC = """
task = "rare positives"
classes = ["no", "yes"]
prior = 0.25

[columns.amount]
kind = "number"
range = [0, 100]

[columns.country]
kind = "category"
values = ["AT", "DE"]
"""
TINY = {"records": 60, "batch_size": 30.0, "noise_multiplier": 1.0, "epochs": 1, "backend": "simulate"}
TINY |= {"policy": "all", "microbatch_size": 8, "width": 0.1}


def runs_on(makers, folder_of) -> dict[str, Path]:
    """Train a run on the records of each maker, in a folder of its name; return {name: directory of the run}.

    Noise is drawn from a seed: what so short a run learns from a secret key is now and then nothing.
    """
    found = {}
    for name, make in makers.items():
        folder = folder_of(name)
        train(TrainSettings.chosen(make(folder)), folder / "run", start=repeating())
        found[name] = folder / "run"
    return found


def as_options(settings) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def table(folder: Path) -> dict[str, object]:
    """Write a table of 80 records and its spec, and return the settings that name them."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(80):
        label, country = "yes" if number % 4 == 0 else "no", ("AT", "DE", "IT")[random.integers(3)]
        lines.append(f"{random.integers(50) + (0 if label == 'no' else 50)},{country},{label}")
    (folder / "t.csv").write_text("amount,country,label\n" + "\n".join(lines) + "\n")
    (folder / "spec.toml").write_text(SPEC)
    return {
        "data": f"table:{folder / 't.csv'}",
        "label_column": "label",
        "spec": str(folder / "spec.toml"),
        "test_share": 0.25,
        **TINY,
    }


def texts(folder: Path) -> dict[str, object]:
    """Write 60 texts and a tokenizer, and return the settings that name them."""
    kinds = (("bad night ", "spam"), ("good day ", "ham"))
    records = [(kinds[n % 2][0] * (1 + 5 * (n % 5)), kinds[n % 2][1]) for n in range(60)]
    lines = [json.dumps({"text": text, "label": label}) for text, label in records]
    for name in ("t.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    return {
        "data": f"text:{folder / 't.jsonl'}",
        "text_column": "text",
        "label_column": "label",
        "classes": "ham,spam",
        "tokenizer": str(tokenizer_in(folder)),
        "max_length": 40,
        "test": str(folder / "test.jsonl"),
        **TINY,
    }


def texts_for(folder: Path, model: str) -> dict[str, object]:
    """Return the settings of `texts` with another network, which has no width."""
    settings = texts(folder)
    del settings["width"]
    return {**settings, "model": model}


def pretrained(folder: Path) -> dict[str, object]:
    return texts_for(folder, f"hf:{bert_in(folder)}")


def regression(folder: Path) -> dict[str, object]:
    """Write a table whose label is a number, and return the settings that name it."""
    settings = table(folder)
    text = (folder / "t.csv").read_text().replace("yes", "1000").replace("no", "900")
    (folder / "t.csv").write_text(text)
    task = 'task = "regression"\nrange = [0, 2000]\n'
    (folder / "spec.toml").write_text(task + SPEC.split("prior = 0.25\n")[1])
    return settings


def images(folder: Path) -> dict[str, object]:
    """Write grey images of two classes, dark and bright, and return the settings that name them."""
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for name, level in (("dark", 60), ("bright", 190)):
            (folder / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (level + random.integers(-40, 40, (8, 8))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / part / name / f"{number}.png")
    return {"data": f"image-folder:{folder / 'photos'}", "image_size": 8, "model": "mlp", **TINY, "lr": 0.02}
