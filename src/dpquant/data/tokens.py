# SPDX-License-Identifier: Apache-2.0
"""Texts in memory, as tokens, and synthetic texts of a tokenizer's vocabulary."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from dpquant.data.form import Form
from dpquant.data.task import UNREADABLE

if TYPE_CHECKING:
    from dpquant.data.texts import Tokens

Inputs = dict[str, Tensor]  # input_ids, attention_mask and, of pairs, token_type_ids: int64 [tokens] or [B, tokens]


class Texts(torch.utils.data.Dataset[tuple[Inputs, Tensor]]):
    """The training or the test records of a set of texts: map-style, in memory.

    An item is (inputs, target), with inputs padded to the record's own bucket; target is an int64 scalar.

    Args:
      tokens: (all tokens,), int32, of all records one after another.
      kinds: (all tokens,), uint8: 1 for the second text of a pair, else 0; None: records are no pairs.
      starts: (N + 1,), int64: record i has the tokens starts[i] .. starts[i + 1].
      targets: (N,), int64; UNREADABLE for a record that cannot be used.
      buckets: lengths to which records are padded.
      padding: token that pads.
    Privacy: per example, reads no other record.
    """

    in_memory = True  # reading a batch takes no time worth a thread

    def __init__(
        self,
        tokens: np.ndarray,
        kinds: np.ndarray | None,
        starts: np.ndarray,
        targets: Tensor,
        *,
        buckets: Sequence[int],
        padding: int,
    ) -> None:
        self._tokens, self._kinds, self._starts = tokens, kinds, starts
        self.buckets, self.padding, self._lengths = tuple(buckets), padding, np.asarray(buckets)
        self._buckets = np.searchsorted(self._lengths, np.diff(starts))
        self.targets, self.readable = targets, targets != UNREADABLE

    @classmethod
    def of(cls, tokens: "Tokens", records: Sequence[tuple[str, ...]], targets: Sequence[int]) -> "Texts":
        """Return records, each of a text or of a pair of texts, as tokens; one without a token cannot be used."""
        encoded, pairs = tokens.encoded(records), any(len(record) == 2 for record in records)
        starts = np.cumsum([0, *(len(one.ids) for one in encoded)], dtype=np.int64)
        known = torch.tensor([target if one.ids else UNREADABLE for one, target in zip(encoded, targets, strict=True)])
        return cls(
            np.fromiter((token for one in encoded for token in one.ids), dtype=np.int32, count=starts[-1]),
            np.fromiter((kind for one in encoded for kind in one.type_ids), dtype=np.uint8, count=starts[-1])
            if pairs
            else None,
            starts,
            known.long(),
            buckets=tokens.buckets,
            padding=tokens.padding,
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]))
        return {name: values[0] for name, values in inputs.items()}, targets[0]

    def arrays(self) -> dict[str, Tensor]:
        """Return what `pack` writes, by name: tokens without padding, where each record's begin, and targets."""
        found = {"tokens": self._tokens, "starts": self._starts}
        if self._kinds is not None:
            found["kinds"] = self._kinds
        return {name: torch.from_numpy(values) for name, values in found.items()} | {"targets": self.targets}

    @property
    def dpquant_lengths(self) -> Sequence[int]:
        """The lengths of the buckets, ascending; public."""
        return self.buckets

    def dpquant_groups(self, record_ids: Tensor) -> Tensor:
        """Return the bucket of each record, int64 (B,): records of a bucket have equal shapes. Privacy: per example."""
        return torch.from_numpy(self._buckets[record_ids.numpy()])

    def dpquant_batch(self, record_ids: Tensor) -> tuple[Inputs, Tensor]:
        """Return `batch(record_ids)`: the method of data sets that collate themselves, see `make_private`."""
        return self.batch(record_ids)

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Return inputs [B, tokens] and targets [B] of the records with these ids, int64 (B,).

        All are padded to the longest bucket among them. Training asks for records of one bucket at a time.
        """
        rows = indices.numpy()
        length = int(self._lengths[self._buckets[rows]].max(initial=self._lengths[0]))
        ids = np.full((len(rows), length), self.padding, dtype=np.int64)
        found = {"input_ids": ids, "attention_mask": np.zeros_like(ids)}
        if self._kinds is not None:
            found["token_type_ids"] = np.zeros_like(ids)
        for place, row in enumerate(rows):
            begin, end = self._starts[row], self._starts[row + 1]
            ids[place, : end - begin] = self._tokens[begin:end]
            # a record of no token attends to its padding; its loss is zero whatever the model makes of it
            found["attention_mask"][place, : max(end - begin, 1)] = 1
            if self._kinds is not None:
                found["token_type_ids"][place, : end - begin] = self._kinds[begin:end]
        return {name: torch.from_numpy(values) for name, values in found.items()}, self.targets[indices]


def text_form(
    *, vocabulary: int, lengths: tuple[int, ...], padding: int | None, class_names: Sequence[str], pairs: bool
) -> Form:
    """Return the form of texts, with synthetic ones on which a model is checked before a record is used.

    All of these have the largest length; the first fills three quarters of it, the second all, the third a half.

    Args:
      vocabulary: number of different tokens.
      lengths: that texts are padded to, ascending; at the last they are cut.
      padding: token that pads; None: the tokenizer names none.
      class_names: in the order of the targets.
      pairs: whether a record is a pair of texts.
    """
    generator, records, longest = torch.Generator().manual_seed(0), [], lengths[-1]
    for number, length in enumerate((-(-3 * longest // 4), longest, -(-longest // 2))):
        place = torch.arange(longest)
        mask = (place < length).long()
        ids = torch.randint(vocabulary, (longest,), generator=generator)
        ids[0] = number % vocabulary
        inputs = {"input_ids": torch.where(mask == 1, ids, torch.tensor(padding or 0)), "attention_mask": mask}
        if pairs:
            inputs["token_type_ids"] = ((place >= length // 3) & (place < length)).long()
        records.append((inputs, torch.tensor(number % len(class_names))))
    return Form(
        num_classes=len(class_names),
        input_shape=(longest,),
        lengths=lengths,
        class_names=tuple(class_names),
        vocabulary=vocabulary,
        padding=padding,
        synthetic=records,
    )
