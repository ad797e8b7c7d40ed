# SPDX-License-Identifier: Apache-2.0
"""A public sentence encoder, all-MiniLM-L6-v2, on three sets of texts at epsilon 8 and 3.

What is trained: a logistic regression on frozen embeddings, which are computed once for each record; the last layer;
adapters; the whole network. The encoder was trained on public text, which is not covered by any epsilon here, and its
training set includes natural language inference. Tables and rows are in the order of what they tell for their time.
"""

from experiments.features import text_options
from experiments.runner import Table
from experiments.settings import SEEDS, in_each_format

DATA = {  # of each set of texts
    "REVIEWS": "--records 8056 --delta 1e-5 --epochs 20 --batch-size 512",
    "NEWSGROUPS": "--records 11293 --delta 1e-5 --epochs 20 --batch-size 512",
    "GLOSSES": "--records 94137 --delta 1e-6 --epochs 10 --batch-size 2048",
}
SHORT = {  # overrides them in rows that run the encoder in every step: half an hour of a core each, if it is new
    "REVIEWS": "--epochs 10",
    "NEWSGROUPS": "--epochs 6 --max-length 64",
    "GLOSSES": "--epochs 2",
}
OPTIMIZER = "--optimizer adamw --lr-schedule cosine --backend int8"
LOGISTIC = "--model experiments.heads:logistic --lr 0.1"
WHOLE = "--model hf:MINILM --lr 5e-4"
ADAPTERS = "--model hf:MINILM --lora 16 --lr 2e-3"
LAST = "--model hf:MINILM --train-only *classifier* --lr 1e-2"
INT8 = "--policy all --format int8"
FORMATS = {  # of the whole network, in the table of FORMATS_OF
    "full precision": "--policy none",
    "luq-fp4, dpquant 0.5": "--policy dpquant --fraction 0.5",
    "luq-fp4, static 0.5": "--policy static --fraction 0.5",
    "int4-clip, dpquant 0.5": "--policy dpquant --fraction 0.5 --format int4-clip",
    "luq-fp4, dpquant 0.9": "--policy dpquant --fraction 0.9",
    "luq-fp4, static 0.9": "--policy static --fraction 0.9",
}
OF_ADAPTERS = ("full precision", "luq-fp4, dpquant 0.5")
FORMATS_OF = "REVIEWS", 8  # a set and an epsilon
TRAINED = (FORMATS_OF, ("REVIEWS", 3), ("NEWSGROUPS", 8), ("GLOSSES", 8))  # where more than frozen embeddings is run


def _rows(name: str) -> dict[str, str]:
    """Return the cheap rows, which are run at every seed."""
    return in_each_format("frozen embeddings", f"--data packed:FROZEN-{name} {LOGISTIC}")


def _once(name: str, epsilon: int) -> dict[str, str]:
    """Return the rows that run the encoder in every step."""
    if (name, epsilon) not in TRAINED:
        return {}
    data = text_options(name)
    short, whole = f"{data} {SHORT[name]}", {"int8, all layers": INT8}
    every = (name, epsilon) == FORMATS_OF
    adapters = dict(whole)
    if every:
        whole |= FORMATS
        adapters |= {what: FORMATS[what] for what in OF_ADAPTERS}
    rows = {f"whole network, {what}": f"{short} {WHOLE} {format}" for what, format in whole.items()}
    rows |= {f"adapters, {what}": f"{short} {ADAPTERS} {format}" for what, format in adapters.items()}
    rows["last layer, full precision"] = f"{short} {LAST} --policy none"
    if every:
        rows["whole network, int8, 20 epochs"] = f"{data} {WHOLE} {INT8}"
        rows["whole network, int8, 4 epochs"] = f"{data} --epochs 4 {WHOLE} {INT8}"
        rows["adapters, int8, 20 epochs"] = f"{data} {ADAPTERS} {INT8}"
    return rows


TABLES = [
    Table(
        name=f"text-{name.lower()}-{epsilon}",
        title=f"{title}, all-MiniLM-L6-v2 (public pre-training), epsilon = {epsilon}",
        common=f"{DATA[name]} {OPTIMIZER} --epsilon {epsilon}",
        rows=_rows(name),
        once=_once(name, epsilon),
        seeds=SEEDS,
    )
    for name, title in {
        "REVIEWS": "Sentences of film reviews",
        "NEWSGROUPS": "20 Newsgroups",
        "GLOSSES": "WordNet glosses",
    }.items()
    for epsilon in (8, 3)
]
