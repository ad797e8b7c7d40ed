# SPDX-License-Identifier: Apache-2.0
"""A small network for texts, which learns everything it knows from the run. Pretrained ones: `pretrained.py`."""

from torch import Tensor, nn

_WIDTH = 64


class EmbeddingMean(nn.Module):
    """Mean of a text's token embeddings, and a network with one hidden layer on it."""

    def __init__(self, vocabulary: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        size = max(1, round(_WIDTH * width))
        self.embedding = nn.Embedding(vocabulary, size)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, num_classes)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits [B, classes]; padding takes no part."""
        mask = inputs["attention_mask"][:, :, None].float()
        mean = (self.embedding(inputs["input_ids"]) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.output(self.hidden(mean).relu())
