# SPDX-License-Identifier: Apache-2.0
"""nn.RNN, nn.LSTM and nn.GRU with per-example gradients, with the same parameters and state_dict.

    a_t = x_t W_ih + b_ih                  one product over all steps, which can run quantized
    u_t = h_(t-1) W_hh + b_hh              step by step, in full precision
    h_t, c_t = cell(a_t, u_t, h_(t-1), c_(t-1))

Each weight's per-example gradient is one sum over steps, W_hh's is sum_t g_t h_(t-1)^T with g_t the gradient of u_t.
Zeros are added to all u_t in one tensor, whose gradient holds all g_t once the backward pass has gone through the
steps: from it and the states one contribution is recorded, as for a linear layer over T positions.

Symbols: B examples, T steps, D input features, H hidden features, G gates (RNN 1, GRU 3, LSTM 4).
"""

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpquant.backends.geometry import Geometry
from dpquant.engine.context import StepContext
from dpquant.engine.products import check_differentiating
from dpquant.engine.quantizable import PartOfLayer, QuantizableLayer
from dpquant.errors import ModelError

_WEIGHTS = "ih", "hh", "hr"  # of inputs, of states, and of LSTM's projection


class QuantRecurrent(QuantizableLayer, nn.RNNBase):
    """What RNN, LSTM and GRU have in common: layers, directions, and steps through a cell.

    Its products with the inputs can run quantized. Those with the states stay in full precision: each is small, and has
    to wait for the one before. Where its parameters are frozen and it is not quantized, torch's kernel computes it.

    Privacy: per example, reads no other row.
    """

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.weight_ih_l0)

    @property
    def geometry(self) -> Geometry:
        return Geometry()

    @functools.cached_property
    def parts(self) -> dict[tuple[str, str], PartOfLayer]:
        """{(ih, hh or hr; suffix of layer and direction): the product with that weight}."""
        found = {}
        for suffix in self._suffixes():
            for which in _WEIGHTS[: 3 if self.proj_size else 2]:
                bias = f"bias_{which}{suffix}" if self.bias and which != "hr" else None
                found[which, suffix] = PartOfLayer(self, f"weight_{which}{suffix}", bias)
        return found

    def _suffixes(self) -> list[str]:
        """Return the ends of the parameters' names, layer by layer, in torch's order."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def cell(self, a: Tensor, u: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next state and, for an LSTM, the next cell state.

        Args:
          a: the inputs' products, `(B, G H)`.
          u: the state's products, `(B, G H)`.
          h: the state, `(B, H)`.
          c: the cell state of an LSTM, `(B, H)`; None for others.
        """
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's, with the same states. A PackedSequence runs in torch's kernel if all is frozen.

        Raises:
          ModelError: trained parameters are called with a PackedSequence.
        """
        run, trained, packed = self.current, self._trained(), isinstance(input, PackedSequence)
        if not trained and (packed or not self.quantized):
            return super().forward(input, hx)
        if packed:
            raise ModelError(
                f"Expected a trainable {type(self).__name__.removeprefix('Quant')} ({self.name!r}) to be called with a "
                "padded tensor; got a PackedSequence. It sorts and interleaves the examples of a batch. Pass the "
                "padded batch, and take each example's last step by its length."
            )
        if input.ndim not in (2, 3):
            return super().forward(input, hx)  # raises torch's error
        lone = input.ndim == 2  # one example without its axis
        x_BTD = input.unsqueeze(0) if lone else input if self.batch_first else input.transpose(0, 1)
        states = self._states(x_BTD, hx, lone)
        y_BTH, last = self._through_layers(x_BTD, states, run or StepContext(key=0))
        y = y_BTH.squeeze(0) if lone else y_BTH if self.batch_first else y_BTH.transpose(0, 1)
        finals = [torch.stack(rows).squeeze(1) if lone else torch.stack(rows) for rows in last]
        return y, finals[0] if len(finals) == 1 else tuple(finals)

    def _trained(self) -> bool:
        """Return whether the layer runs in a step context that trains parameters of it."""
        return self.current is not None and any(map(self.current.trains, self.parameters()))

    def _states(self, x_BTD: Tensor, hx: Any, lone: bool) -> list[Tensor]:
        """Return the first states, `(layers * directions, B, H)`; of an LSTM also the first cell states."""
        count, num = len(self._suffixes()), len(x_BTD)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        if hx is None:
            return [x_BTD.new_zeros(count, num, size) for size in sizes]
        given = [state.unsqueeze(1) if lone else state for state in (hx if self.mode == "LSTM" else (hx,))]
        for state, size in zip(given, sizes, strict=True):
            if state.shape != (count, num, size):
                raise ModelError(
                    f"Expected the first states of {self.name!r} to have shape {(count, num, size)}: layers and "
                    f"directions, examples, features; got {tuple(state.shape)}. Reshape them."
                )
        return given

    def _through_layers(
        self, x_BTD: Tensor, states: list[Tensor], run: StepContext
    ) -> tuple[Tensor, tuple[list[Tensor], ...]]:
        """Return the last layer's states at all steps, `(B, T, directions H)`, and the last states of all layers."""
        finals = tuple([] for _ in states)
        suffixes, directions = self._suffixes(), 2 if self.bidirectional else 1
        for first in range(0, len(suffixes), directions):
            if first and self.dropout and self.training:
                x_BTD = F.dropout(x_BTD, self.dropout)
            outputs = []
            for number in range(first, first + directions):
                given = [state[number] for state in states]
                y_BTH, last = self._through_steps(x_BTD, given, suffixes[number], run)
                outputs.append(y_BTH)
                for rows, state in zip(finals, last, strict=True):
                    rows.append(state)
            x_BTD = torch.cat(outputs, 2)
        return x_BTD, finals

    def _through_steps(
        self, x_BTD: Tensor, states: list[Tensor], suffix: str, run: StepContext
    ) -> tuple[Tensor, list[Tensor]]:
        """Return one layer's states at all steps of one direction, in the input's order, and its last ones."""
        a_BTG = self.parts["ih", suffix].over_positions(x_BTD)
        backwards = suffix.endswith("_reverse")
        h, c = states[0], states[1] if len(states) > 1 else None
        from_states = _StepByStep(self.parts["hh", suffix], a_BTG, run)
        projected = _StepByStep(self.parts["hr", suffix], x_BTD, run) if self.proj_size else None
        found = []
        for a in (a_BTG.flip(1) if backwards else a_BTG).unbind(1):
            h, c = self.cell(a, from_states(h), h, c)
            h = h if projected is None else projected(h)
            found.append(h)
        y_BTH = torch.stack(found, 1)
        return y_BTH.flip(1) if backwards else y_BTH, [h] if c is None else [h, c]

    def macs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> float:
        """Count the products with the inputs, which are those that a precision is about."""
        steps = output[0] if isinstance(output[0], Tensor) else None
        if steps is None:  # packed
            return 0.0
        length = steps.shape[-2 if self.batch_first or steps.ndim == 2 else 0]
        return float(
            length * sum(cast(Tensor, part.weight).numel() for (which, _), part in self.parts.items() if which == "ih")
        )


class QuantRNN(QuantRecurrent, nn.RNN):
    """An nn.RNN with per-example gradients."""

    def cell(self, a: Tensor, u: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (a + u).relu() if self.mode == "RNN_RELU" else (a + u).tanh(), None


class QuantLSTM(QuantRecurrent, nn.LSTM):
    """An nn.LSTM with per-example gradients."""

    def cell(self, a: Tensor, u: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert c is not None
        entered, forgotten, new, shown = (a + u).chunk(4, 1)
        c = forgotten.sigmoid() * c + entered.sigmoid() * new.tanh()
        return shown.sigmoid() * c.tanh(), c


class QuantGRU(QuantRecurrent, nn.GRU):
    """An nn.GRU with per-example gradients."""

    def cell(self, a: Tensor, u: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (reset_a, kept_a, new_a), (reset_u, kept_u, new_u) = a.chunk(3, 1), u.chunk(3, 1)
        kept = (kept_a + kept_u).sigmoid()
        new = (new_a + (reset_a + reset_u).sigmoid() * new_u).tanh()
        return (1 - kept) * new + kept * h, None


class _StepByStep:
    """A linear product that is computed one step after the other, and recorded on the tape for all steps at once."""

    def __init__(self, part: PartOfLayer, like_BTD: Tensor, run: StepContext):
        """Begin at the first step of a sequence.

        Args:
          part: the product.
          like_BTD: gives the numbers of examples and steps, dtype and device.
          run: the step context.
        """
        self._part, self._states = part, []
        self._probes = None
        if run.tape is not None and (run.trains(part.weight) or run.trains(part.bias)):
            shape = (*like_BTD.shape[:2], part.weight.shape[0])
            zeros = cast(Tensor, _Probe.apply(run.tape.anchor, like_BTD.new_zeros(shape), part, run, self._states))
            self._probes = iter(zeros.unbind(1))

    def __call__(self, state_BH: Tensor) -> Tensor:
        """Return the product of the next step, `(B, O)`."""
        product = F.linear(state_BH, self._part.weight, self._part.bias)
        if self._probes is None:
            return product
        self._states.append(state_BH.detach())
        return product + next(self._probes)


class _Probe(torch.autograd.Function):
    """Zeros that are added to the outputs of a product; backward records the outputs' gradients and the inputs."""

    @staticmethod
    def forward(ctx, anchor, zeros, part: PartOfLayer, run: StepContext, states: list[Tensor]):
        ctx.part, ctx.run, ctx.states = part, run, states
        return zeros.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        check_differentiating(ctx.run)
        grad_BOT1 = grads[0].transpose(1, 2).unsqueeze(3)
        x_BHT1 = torch.stack(ctx.states, 2).unsqueeze(3)
        ctx.run.tape.record(ctx.part, x_BHT1, grad_BOT1, grad_BOT1)
        return None, None, None, None, None
