# SPDX-License-Identifier: Apache-2.0
"""Convolutions over one, two and three axes whose three products can run quantized, all as 2-D convolutions.

    1-D   a map of height 1
    3-D   y[o, d] = sum_k W[o, :, k] * x[:, d s + k e]: for each output slice d the kernel's slices k are channels. The
          slices are stacked along the height, with the padding between them, so that one 2-D convolution computes them

The lines of a stack whose windows reach into the next slice belong to no output. They are left out, so that their
gradient is zero.

Symbols: B examples, C input channels, O output channels, D x H x W input size, d output slices, k kernel slices, s
stride and e dilation along the depth.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.backends.geometry import Geometry
from dpquant.engine.quantizable import QuantizableLayer
from dpquant.errors import ModelError


class _QuantConv(QuantizableLayer, nn.modules.conv._ConvNd):
    """What the three have in common: how much of the padding the product does itself."""

    @property
    def _pads_inside(self) -> bool:
        """Whether the convolution pads by itself: with zeros, equally on both sides. Else `forward` pads before."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def _zeros(self) -> tuple[int, ...]:
        """Return the zeros on each side of each axis that `forward` has not added."""
        return cast(tuple[int, ...], self.padding) if self._pads_inside else (0,) * len(self.kernel_size)

    def _padded(self, input: Tensor) -> Tensor:
        """Check the input's axes, and pad it as far as the convolution does not do it by itself."""
        axes = len(self.kernel_size)
        if input.ndim != axes + 2:
            sizes = ", ".join("DHW"[-axes:])
            raise ModelError(
                f"Expected input of layer {self.name!r} to have shape (B, {self.in_channels}, {sizes}); got "
                f"{tuple(input.shape)}. Its first axis is the example, whose gradient is clipped. Reshape the input."
            )
        input = self.for_each_example(input)
        if self._pads_inside:
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, self._reversed_padding_repeated_twice, mode=mode)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """A Conv2d whose products can run quantized, with any stride, padding, dilation, groups and padding mode."""

    @property
    def geometry(self) -> Geometry:
        pairs = (self.kernel_size, self.stride, self._zeros(), self.dilation)
        kernel, stride, padding, dilation = ((pair[0], pair[1]) for pair in pairs)
        return Geometry(kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=self.groups)

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(self._padded(input))


class QuantConv1d(_QuantConv, nn.Conv1d):
    """A Conv1d whose products can run quantized, with any stride, padding, dilation, groups and padding mode."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            kernel=(1, self.kernel_size[0]),
            stride=(1, self.stride[0]),
            padding=(0, self._zeros()[0]),
            dilation=(1, self.dilation[0]),
            groups=self.groups,
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(self._padded(input).unsqueeze(2)).squeeze(2)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """A Conv3d whose products can run quantized, with any stride, padding, dilation, groups and padding mode."""

    @property
    def geometry(self) -> Geometry:
        (_, *kernel), (_, *stride), (_, *dilation) = self.kernel_size, self.stride, self.dilation
        return Geometry(
            kernel=(kernel[0], kernel[1]),
            stride=(stride[0], stride[1]),
            padding=(0, self._zeros()[2]),  # those of depth and height lie in the stack
            dilation=(dilation[0], dilation[1]),
            groups=self.groups,
        )

    def forward(self, input: Tensor) -> Tensor:
        (deep, high, _), (step, down, _) = self._zeros(), self.stride
        x_BCDHW = F.pad(self._padded(input), (0, 0, high, high, deep, deep))
        reach, across = (e * (k - 1) for e, k in zip(self.dilation[:2], self.kernel_size[:2], strict=True))
        if x_BCDHW.shape[2] <= reach or x_BCDHW.shape[3] <= across:
            return super().forward(input)  # raises torch's error
        x_BCdHWk = x_BCDHW.unfold(2, reach + 1, step)[..., :: self.dilation[0]]
        slices, lines = x_BCdHWk.shape[2], (x_BCdHWk.shape[3] - across - 1) // down + 1
        per_slice = -(-x_BCdHWk.shape[3] // down) * down  # a slice's windows begin where the stride takes them
        x_BCkdHW = F.pad(x_BCdHWk.movedim(-1, 2), (0, 0, 0, per_slice - x_BCdHWk.shape[3]))
        stack = F.pad(x_BCkdHW.flatten(1, 2).flatten(2, 3), (0, 0, 0, across))
        return self.convolve(stack).unflatten(2, (slices, -1))[:, :, :, :lines]
