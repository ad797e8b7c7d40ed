# SPDX-License-Identifier: Apache-2.0
"""Canaries: records with nothing in common with others, in the form of a data set's, and coins that say which join it.

An image has random black and white pixels, a row random numbers and categories, a text random tokens, as many as it may
have; the label is random. Nothing but having seen them predicts it. Their values are possible ones, though no record
has them: the promise holds for whatever record is added.

Symbols: m canaries.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from dpquant.data.form import Form
from dpquant.data.rows import Rows
from dpquant.data.split import Split
from dpquant.data.tokens import Texts

InMemory = Split | Rows | Texts


@dataclasses.dataclass(frozen=True, eq=False)
class Canaries:
    """Records whose part in a training is to be guessed.

    Attributes:
      inputs: `(m, ...)`: pixels, encoded rows, or tokens.
      targets: `(m,)`, as of the data set.
      inside: bool `(m,)`, the coins.
    """

    inputs: Tensor
    targets: Tensor
    inside: Tensor

    @classmethod
    def for_records(cls, records: InMemory, form: Form, count: int, seed: int) -> "Canaries":
        """Draw the canaries and toss the coins. Uses the form and the type of the records, and none of them."""
        random = torch.Generator().manual_seed(seed)
        shape = (count, *form.input_shape)
        match records:
            case Split():
                pixels = torch.randint(2, shape, generator=random) * records.full_scale
                inputs = pixels.to(records.pixels.dtype)
            case Rows():
                inputs = torch.rand(shape, generator=random)
                for place, size in enumerate(form.categories, form.input_shape[0] - len(form.categories)):
                    inputs[:, place] = torch.randint(size, (count,), generator=random).float()
            case Texts():
                inputs = torch.randint(form.vocabulary or 1, shape, generator=random, dtype=torch.int32)
        if form.task.kind == "regression":
            targets = torch.rand(count, generator=random) * 2 - 1
        else:
            targets = torch.randint(form.num_classes, (count,), generator=random)
        return cls(inputs=inputs, targets=targets, inside=torch.rand(count, generator=random) < 0.5)

    def alone(self, like: InMemory, rows: Tensor | None = None) -> InMemory:
        """Return the canaries as records of a kind; `rows`, bool `(m,)`, chooses some of them."""
        rows = torch.ones(len(self.targets), dtype=torch.bool) if rows is None else rows
        inputs, targets = self.inputs[rows], self.targets[rows]
        readable = torch.ones(len(targets), dtype=torch.bool)
        match like:
            case Split():
                return _normalised(Split(inputs, targets, readable=readable, full_scale=like.full_scale), like)
            case Rows():
                return Rows(inputs, targets, readable)
            case Texts():
                kinds = like.arrays().get("kinds")
                second = (torch.arange(inputs.shape[1]) * 2 >= inputs.shape[1]).to(torch.uint8)  # of a pair
                return Texts(
                    inputs.flatten().numpy(),
                    None if kinds is None else second.repeat(len(inputs)).numpy(),
                    np.arange(len(inputs) + 1, dtype=np.int64) * inputs.shape[1],
                    targets,
                    buckets=like.buckets,
                    padding=like.padding,
                )

    def among(self, records: InMemory) -> InMemory:
        """Return the records and, after them, the canaries whose coin says so."""
        ours, theirs = records.arrays(), self.alone(records, self.inside).arrays()
        both = {name: torch.cat([ours[name], theirs[name]]) for name in ours.keys() - {"starts"}}
        match records:
            case Split():
                joined = Split(
                    both["pixels"], both["targets"], readable=both["readable"], full_scale=records.full_scale
                )
                return _normalised(joined, records)
            case Rows():
                return Rows(both["inputs"], both["targets"], both["readable"])
            case Texts():
                starts = torch.cat([ours["starts"], theirs["starts"][1:] + ours["starts"][-1]])
                return Texts(
                    both["tokens"].numpy(),
                    both["kinds"].numpy() if "kinds" in both else None,
                    starts.numpy(),
                    both["targets"],
                    buckets=records.buckets,
                    padding=records.padding,
                )


def _normalised(split: Split, like: Split) -> Split:
    split.normalisation = like.normalisation
    return split
