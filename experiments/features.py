# SPDX-License-Identifier: Apache-2.0
"""Features of public networks, computed once for each record and packed as rows.

A record's features are a function of that record alone, so whatever is private of the features is of the records.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.data.dataset import Dataset
from dpquant.data.held import Held
from dpquant.data.pack import pack
from dpquant.data.rows import Rows
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from experiments import lite0
from experiments.packages import GLOSS_CLASSES, NEWSGROUP_CLASSES, REVIEW_CLASSES

CLASSES = {"REVIEWS": REVIEW_CLASSES, "NEWSGROUPS": NEWSGROUP_CLASSES, "GLOSSES": GLOSS_CLASSES}
LENGTHS = {"REVIEWS": 64, "NEWSGROUPS": 128, "GLOSSES": 64}  # tokens at which texts are cut
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Features:
    """How features are made.

    Attributes:
      needs: names of the folders with records and weights.
      make: writes (records, weights, folder).
    """

    needs: tuple[str, str]
    make: Callable[[Path, Path, Path], None]


def text_options(name: str) -> str:
    """Return the options of `dpquant train` that read a set of texts."""
    return (
        f"--data text:{name}/train.csv --test {name}/test.csv --text-column text --label-column label "
        f"--classes {','.join(CLASSES[name])} --tokenizer MINILM --max-length {LENGTHS[name]}"
    )


def _of_texts(name: str, records: Path, weights: Path, out: Path) -> None:
    """Pack the mean of MiniLM's last hidden states over a text's tokens, scaled to norm 1, as its authors use it."""
    from transformers import AutoModel

    settings = TrainSettings.chosen(
        {
            "data": f"text:{records / 'train.csv'}",
            "test": str(records / "test.csv"),
            "text_column": "text",
            "label_column": "label",
            "classes": ",".join(CLASSES[name]),
            "tokenizer": str(weights),
            "max_length": LENGTHS[name],
        }
    )
    network = AutoModel.from_pretrained(weights, local_files_only=True).eval()

    def embedded(inputs: dict[str, Tensor]) -> Tensor:
        states = network(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].float()
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    _pack(dataset_of(settings), embedded, "mean of all-MiniLM-L6-v2, norm 1", out)


def _of_images(records: Path, weights: Path, out: Path) -> None:
    """Pack what EfficientNet-lite0's head reads, scaled to norm 1."""
    dataset = dataset_of(TrainSettings.chosen({"data": f"image-folder:{records}"}))
    network = lite0.pretrained(weights, dataset.num_classes).to(memory_format=torch.channels_last).eval()

    def features(images: Tensor) -> Tensor:
        return F.normalize(network.features(images.contiguous(memory_format=torch.channels_last)), dim=1)

    _pack(dataset, features, f"EfficientNet-lite0 at {lite0.SIDE} pixels, norm 1", out)


@torch.no_grad()
def _pack(dataset: Dataset, network: Callable[[Any], Tensor], what: str, out: Path) -> None:
    train, test = (_rows(split, network) for split in (dataset.train, dataset.test))
    generator, width = torch.Generator().manual_seed(0), train.inputs.shape[1]
    rows = F.normalize(torch.randn(3, width, generator=generator), dim=1)
    made = dataclasses.replace(
        dataset,
        train=train,
        test=test,
        input_shape=(width,),
        lengths=(),
        vocabulary=None,
        padding=None,
        synthetic=[(row, torch.tensor(number % dataset.num_classes)) for number, row in enumerate(rows)],
        facts={"features": what},
    )
    pack(lambda _: made, out)


def _rows(split: Held, network: Callable[[Any], Tensor]) -> Rows:
    """Return the features of all records of a split. Texts go in the order of their lengths, as padding costs time."""
    groups: Any = getattr(split, "dpquant_groups", None)
    everyone = torch.arange(len(split))
    order = everyone if groups is None else groups(everyone).argsort(stable=True)
    found = torch.cat([network(split.batch(ids)[0]) for ids in _pieces(order)])
    inputs = torch.empty_like(found)
    inputs[order] = found
    return Rows(inputs, split.targets, split.readable)


def _pieces(order: Tensor) -> Iterable[Tensor]:
    return order.split(_AT_ONCE)


FEATURES = {
    **{f"FROZEN-{name}": Features((name, "MINILM"), functools.partial(_of_texts, name)) for name in CLASSES},
    **{f"FROZEN-{name}": Features((name, "LITE0"), _of_images) for name in ("GTSRB", "CIFAR10")},
}
