# SPDX-License-Identifier: Apache-2.0
"""Random views of an image, whose gradients are averaged before they are clipped.

The loss of an example is the mean of the losses of its views, so its gradient is the mean of their gradients, and that
mean is what is clipped: the sensitivity is that of one example, however many views it has. A view is a call of the
model of its own, with roundings and dropout of its own. Its shift and its mirroring follow from the run's secret key,
the step, the record and the view (`engine/randomness.py`): torch.rand here has one row for each example.

Source: De et al. 2022, arXiv:2204.13650, section 3.2.
Symbols: B examples, K views, C channels, H height, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.data.dataset import Dataset
from dpquant.engine.passes import PerExampleLoss
from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings

_SHIFT = 8  # an image is shifted by at most this part of its side
_DRAWS = 3  # of a view: shift down, shift to the right, mirrored or not


def augmented(loss_fn: PerExampleLoss, settings: TrainSettings, dataset: Dataset) -> PerExampleLoss:
    """Return the loss of a run: of random views if the settings ask for them, else the given one.

    Args:
      loss_fn: `(model, (images, targets)) -> Tensor (B,)`.
      settings: of the run.
      dataset: of the run.
    Raises:
      SettingError: views of what are no images.
    Privacy: per example. A view depends on its own record and on draws of that record.
    """
    if settings.augment == "none":
        return loss_fn
    if len(dataset.input_shape) != 3:
        raise SettingError(
            f"Expected images for augment={settings.augment}; got data={settings.data}, whose records are none. "
            "There is nothing to shift. Leave augment out."
        )
    mirrors = settings.augment == "crop-flip"

    def over_views(model: nn.Module, batch: tuple[Tensor, Any]) -> Tensor:
        images, targets = batch
        draws_BK3 = torch.rand(len(images), settings.views or 1, _DRAWS, device=images.device)
        losses = [loss_fn(model, (view_of(images, draws_B3, mirrors), targets)) for draws_B3 in draws_BK3.unbind(1)]
        return torch.stack(losses).mean(0)

    return over_views


def view_of(images: Tensor, draws_B3: Tensor, mirrors: bool) -> Tensor:
    """Return images shifted by up to an eighth of their side, with mirrored pixels at the edge, and perhaps mirrored.

    Args:
      images: float32 `(B, C, H, W)`.
      draws_B3: in [0, 1): each example's shift down, shift to the right, and whether it is mirrored.
      mirrors: False: none is.
    """
    height, width = images.shape[2:]
    margins = height // _SHIFT, width // _SHIFT
    padded = F.pad(images, (margins[1], margins[1], margins[0], margins[0]), mode="reflect")
    begins = [(draws_B3[:, axis] * (2 * margin + 1)).long() for axis, margin in enumerate(margins)]
    rows_BH, columns_BW = (
        begin[:, None] + torch.arange(size, device=images.device)
        for begin, size in zip(begins, (height, width), strict=True)
    )
    if mirrors:
        columns_BW = torch.where(draws_B3[:, 2:] < 1 / 2, columns_BW.flip(1), columns_BW)
    examples, channels = (torch.arange(size, device=images.device) for size in images.shape[:2])
    return padded[
        examples[:, None, None, None], channels[:, None, None], rows_BH[:, None, :, None], columns_BW[:, None, None, :]
    ]
