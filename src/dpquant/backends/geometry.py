# SPDX-License-Identifier: Apache-2.0
"""Kernel, stride, padding, dilation and groups of a 2-D convolution, and the part of the kernel that meets input."""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Kernel, stride, padding, dilation and groups of a 2-D convolution. All pairs are (height, width)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def reach(self) -> tuple[int, int]:
        """The receptive field minus one: dilation * (kernel - 1)."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    def cropped(self, size: tuple[int, int]) -> tuple["Geometry", tuple[slice, slice]]:
        """Crop the kernel taps that only read padding for inputs of `size`.

        A 3x3 kernel on a 1x1 image becomes a 1x1 kernel, with a ninth of the weight and of the work.

        Args:
          size: (H, W) of the input.
        Returns: the smaller geometry, and the kernel rows and columns that are kept.
        """
        if self.kernel == (1, 1):  # every linear layer, at every call
            return self, (slice(0, 1), slice(0, 1))
        rows, columns = (
            _met(*axis) for axis in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if (rows.stop - rows.start, columns.stop - columns.start) == self.kernel:
            return self, (rows, columns)
        kernel = (rows.stop - rows.start, columns.stop - columns.start)
        padding = (
            self.padding[0] - rows.start * self.dilation[0],
            self.padding[1] - columns.start * self.dilation[1],
        )
        return dataclasses.replace(self, kernel=kernel, padding=padding), (rows, columns)

    @functools.cached_property
    def pointwise(self) -> bool:
        """True for a 1x1 convolution without stride, padding or groups, which is a matrix product over positions."""
        return self == Geometry(groups=self.groups) and self.groups == 1


@functools.cache
def _met(size: int, kernel: int, stride: int, padding: int, dilation: int) -> slice:
    """Return the taps of an axis that read the image, first to last; all taps if cropping would change the outputs."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    met = [
        tap
        for tap in range(kernel)
        if any(0 <= position * stride + tap * dilation - padding < size for position in range(outputs))
    ]
    if met:
        count, start = met[-1] + 1 - met[0], padding - met[0] * dilation
        # padding is equal on both sides, so the cropped kernel may give another number of outputs
        if start >= 0 and (size + 2 * start - dilation * (count - 1) - 1) // stride + 1 == outputs:
            return slice(met[0], met[-1] + 1)
    return slice(0, kernel)
