# SPDX-License-Identifier: Apache-2.0
"""GroupNorm whose backward pass puts per-example parameter gradients on the tape.

    y = gamma (x - mean) rstd + beta,     mean and rstd over a group's channels and all positions of one example
    gamma's gradient of example i  = sum_t grad_it (x_it - mean_i) rstd_i,      beta's  = sum_t grad_it

The backward pass forms these sums per example anyway, but torch's operator adds them over the batch. `prepare` replaces
each GroupNorm by this twin, which has the same parameters, state_dict and function. A native kernel computes it for
channels-last float32 maps on the CPU. All other inputs go through torch's operator, and the hooks of `engine/tape.py`
record their gradients.

Symbols: B examples, T positions, C channels, G groups. Source: Wu and He, arXiv 1803.08494.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dpquant.engine.context import Tape, anchor_for
from dpquant.engine.contributions import Materialised
from dpquant.native import kernels


class TapedGroupNorm(nn.GroupNorm):
    """A GroupNorm that records its parameters' per-example gradients on a tape, where the native kernel runs.

    Attributes:
      tape: receives the parameters' per-example gradients; None = the layer behaves as an ordinary GroupNorm.
      kernels: the native module, or a test double of it; None = not built, and torch's operator is used.

    Privacy: per example, reads no other row.
    """

    tape: Tape | None
    kernels: Any = kernels

    def records(self, x: Tensor) -> bool:
        """Return whether the layer itself records the gradients of a call on x; else the tape's hooks must."""
        return self.tape is not None and self.tape.listening and self._runs_native(x)

    def forward(self, input: Tensor) -> Tensor:
        if self.records(input) or (self._runs_native(input) and not torch.is_grad_enabled()):
            anchor = anchor_for(self.tape, self.weight, self.bias)
            return cast(Tensor, _GroupNorm.apply(input, self.weight, self.bias, anchor, self, self.tape))
        return super().forward(input)

    def _runs_native(self, x: Tensor) -> bool:
        """Return whether the native kernel takes x. A wrong number of channels goes to torch, which raises an error."""
        able = self.kernels is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
        fits = x.ndim == 4 and x.shape[1] == self.num_channels
        return able and fits and x.is_contiguous(memory_format=torch.channels_last)


class _GroupNorm(torch.autograd.Function):
    """Runs the kernel forward and backward. Backward returns the input gradient; parameter gradients go to the tape."""

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, layer: TapedGroupNorm, tape: Tape | None):
        mean, rstd = x.new_empty(2, len(x), layer.num_groups)
        y = torch.empty_like(x)
        layer.kernels.group_norm(
            x.numpy(), _array(weight), _array(bias), y.numpy(), mean.numpy(), rstd.numpy(), eps=layer.eps,
            **_sizes(x, layer),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.tape = layer, tape
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x, (grad_weight, grad_bias) = torch.empty_like(x), x.new_empty(2, *x.shape[:2])
        ctx.layer.kernels.group_norm_backward(
            grad.numpy(), x.numpy(), _array(weight), mean.numpy(), rstd.numpy(), grad_x.numpy(), grad_weight.numpy(),
            grad_bias.numpy(), **_sizes(x, ctx.layer),
        )  # fmt: skip
        if weight is not None:
            ctx.tape.add(ctx.layer.weight, Materialised(grad_weight))
            ctx.tape.add(ctx.layer.bias, Materialised(grad_bias))
        return grad_x, None, None, None, None, None


def _array(parameter: Tensor | None) -> Any:
    """Return the parameter as a contiguous NumPy array; None if the layer has no such parameter."""
    return None if parameter is None else parameter.detach().contiguous().numpy()


def _sizes(x: Tensor, layer: TapedGroupNorm) -> dict[str, int]:
    """Return the kernel's arguments for x's sizes and the number of threads."""
    return {
        "positions": x.shape[2] * x.shape[3],
        "channels": x.shape[1],
        "groups": layer.num_groups,
        "threads": torch.get_num_threads(),
    }
