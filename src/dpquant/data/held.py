# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation need of a set of records in memory, whatever they are; and how test records are chosen.

A record is put into the test set by a hash of its own content, so that adding or removing another record does not move
it. Equal records go to the same side. Loads no torch.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_OF_2_64 = float(2**64)


class Held(Protocol):
    """Records in memory, map-style.

    Attributes:
      targets: (N,), int64 classes or float32 numbers; -1 or NaN for a record that cannot be used.
      readable: (N,), bool.
    """

    targets: "Tensor"
    readable: "Tensor"

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def batch(self, indices: "Tensor", /) -> "tuple[Any, Tensor]":
        """Return inputs and targets of the given records, collated."""
        ...


def is_for_test(record: Sequence[Any], share: float) -> bool:
    """Return whether a record belongs to the test set, by a hash of its content.

    Args:
      record: its values, texts and numbers.
      share: of all possible records that do, in 0 .. 1.
    Privacy: per example.
    """
    content = "\x1f".join(repr(value) for value in record)
    digest = hashlib.sha256(f"dpquant test {content}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * _OF_2_64
