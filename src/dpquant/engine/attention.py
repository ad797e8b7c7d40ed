# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention whose projections can run quantized and have per-example gradients, with the same state_dict.

    q, k, v = x_q Wq + bq, x_k Wk + bk, x_v Wv + bv         the in-projection: one product for equal inputs
    y       = softmax(q k^T / sqrt(d) + mask) v  Wo + bo     d: features of a head

Torch stores the in-projection as one parameter `(3E, E)` where all inputs have E features, and calls no layer for it.
The twin is itself the quantizable layer of the in-projection. Inputs that are the same tensor are multiplied by their
rows of the parameter together: self-attention is one product, attention to a memory is two. `out_proj` is a quantizable
layer of its own. The attention between them has no parameters and stays in full precision.

Torch's encoder layers leave their modules out where nothing requires a gradient: in evaluation they call one kernel
with all weights, which would compute quantized layers in full precision. The twins do not meet its conditions.

Symbols: B examples, L queries, S keys, E features, N heads.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dpquant.backends.geometry import Geometry
from dpquant.engine.quantizable import PartOfLayer, QuantizableLayer, QuantLinear
from dpquant.errors import ModelError


class QuantOutProjection(QuantLinear, NonDynamicallyQuantizableLinear):
    """The output projection of an attention: a Linear under another name."""


class QuantMultiheadAttention(QuantizableLayer, nn.MultiheadAttention):
    """An nn.MultiheadAttention whose products with weights can run quantized, without `add_bias_kv` or `add_zero_attn`.

    Its own product is the in-projection.

    Privacy: per example, reads no other row.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: a condition under which TransformerEncoderLayer calls its modules."""
        return False

    @property
    def weight(self) -> Tensor:
        return self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        return self.in_proj_bias

    @property
    def geometry(self) -> Geometry:
        return Geometry()

    @functools.cached_property
    def parts(self) -> dict[tuple[int, int], PartOfLayer]:
        """{(first, last + 1) of query, key, value: the product that projects them}."""
        bias = None if self.in_proj_bias is None else "in_proj_bias"
        size = self.embed_dim
        if self.in_proj_weight is not None:
            spans = [(first, end) for first in range(3) for end in range(first + 1, 4)]
            return {
                (first, end): PartOfLayer(self, "in_proj_weight", bias, rows=rows, bias_rows=rows)
                for first, end in spans
                for rows in ((first * size, end * size),)
            }
        names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        return {
            (n, n + 1): PartOfLayer(self, name, bias, bias_rows=(n * size, (n + 1) * size))
            for n, name in enumerate(names)
        }

    def project(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return queries, keys and values `(B, L or S, E)` of three inputs; those of one tensor by one product."""
        projected, first = [], 0
        while first < 3:
            end = first + 1
            while end < 3 and inputs[end] is inputs[first] and (first, end + 1) in self.parts:
                end += 1
            y = self.parts[first, end].over_positions(inputs[first])
            projected += y.chunk(end - first, -1)
            first = end
        return projected

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; `is_causal` is a hint that torch uses for speed, and the mask alone counts."""
        if is_causal and attn_mask is None:
            raise ModelError(
                f"Expected attn_mask where is_causal=True; got none for {self.name!r}. It is only a hint that the mask "
                "is causal. Pass the mask, as nn.Transformer.generate_square_subsequent_mask makes it."
            )
        lone = query.ndim == 2  # one example without its axis
        example = 0 if self.batch_first and not lone else 1
        same: dict[int, Tensor] = {}
        inputs = [
            same.setdefault(id(x), x.unsqueeze(0) if lone else x.transpose(0, example)) for x in (query, key, value)
        ]
        if not all(x.ndim == 3 and x.shape[0] == inputs[0].shape[0] for x in inputs):
            raise ModelError(
                f"Expected query, key and value of {self.name!r} to have one axis of examples, one of positions and "
                f"one of features; got {', '.join(str(tuple(x.shape)) for x in (query, key, value))}. Reshape them."
            )
        heads = [x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in self.project(inputs)]
        key_padding_mask = key_padding_mask.unsqueeze(0) if lone and key_padding_mask is not None else key_padding_mask
        mask = self._mask(heads, key_padding_mask, attn_mask)
        y_BNLD, weights_BNLS = self._attend(heads, mask, need_weights)
        y = self.out_proj(y_BNLD.transpose(1, 2).flatten(2))
        weights = weights_BNLS.mean(1) if weights_BNLS is not None and average_attn_weights else weights_BNLS
        if lone:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y.transpose(0, example), weights

    def _mask(
        self, heads: Sequence[Tensor], key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Return both masks as numbers to add to the scores `(B, N, L, S)`, in a shape that broadcasts to it."""
        count, num_heads, queries, _ = heads[0].shape
        keys = heads[1].shape[2]
        total = None
        if attn_mask is not None:
            if attn_mask.shape not in ((queries, keys), (count * num_heads, queries, keys)):
                raise ModelError(
                    f"Expected attn_mask of {self.name!r} to have shape {(queries, keys)} or "
                    f"{(count * num_heads, queries, keys)}; got {tuple(attn_mask.shape)}. Without an axis of "
                    "examples it holds for all of them."
                )
            total = added(attn_mask, heads[0].dtype)
            total = total if total.ndim == 2 else total.unflatten(0, (count, num_heads))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (count, keys):
                raise ModelError(
                    f"Expected key_padding_mask of {self.name!r} to have shape {(count, keys)}, one row for each "
                    f"example; got {tuple(key_padding_mask.shape)}."
                )
            padding = added(key_padding_mask, heads[0].dtype)[:, None, None, :]
            total = padding if total is None else total + padding
        return total

    def _attend(self, heads: Sequence[Tensor], mask: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return what the heads attend to, `(B, N, L, E / N)`, and the weights `(B, N, L, S)` if they are needed."""
        q, k, v = heads
        dropout = self.dropout if self.training else 0.0
        if not need_weights and not dropout:
            return F.scaled_dot_product_attention(q, k, v, mask), None
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        # a mask of its own for each example: a fused kernel would draw it by place in the batch
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights if need_weights else None

    def macs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> float:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        axis = -2 if self.batch_first or given["query"].ndim == 2 else 0
        return sum(
            given[name].shape[axis] * given[name].shape[-1] * self.embed_dim for name in ("query", "key", "value")
        )


class PaddedTransformerEncoder(nn.TransformerEncoder):
    """An nn.TransformerEncoder that never packs its batch into a nested tensor, which its layers could not take."""

    @property
    def use_nested_tensor(self) -> bool:
        return False


def has_product(module: nn.MultiheadAttention) -> bool:
    """Return whether the twin computes this attention: one that adds no keys and values of its own."""
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers that are added to scores: of booleans, minus infinity where it is True, which hides."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
