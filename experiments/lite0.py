# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-lite0 with public weights of ImageNet, for images of any size: `--model experiments.lite0:finetuned`.

BatchNorm keeps its public statistics (`dpquant.fix(model, batch_norm="freeze")`), so that examples stay apart. Source:
Tan and Le 2019, arXiv:1905.11946; the lite networks have no squeeze-and-excitation, and ReLU6.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpquant

FACTORIES = "--model experiments.lite0:"  # options of a run that begin so need the weights
WEIGHTS = "DPQUANT_LITE0"  # environment variable with the folder of weights.pth
SIDE = 96  # pixels that images are brought to: 224 gives features that are better, and takes five times as long
FEATURES = 1280
_STEM = 32
_STAGES = (  # expansion, channels, blocks, stride of the first, kernel
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve with TensorFlow's padding, which may be uneven: the output is the input over the stride.

    It is no class of convolutions: dpquant has a twin for torch's own alone, and evaluates others example by example.
    """
    spare = [
        max((-(-size // stride) - 1) * stride + kernel - size, 0)
        for size, stride, kernel in zip(x.shape[2:], convolution.stride, convolution.kernel_size, strict=True)
    ]
    return convolution(F.pad(x, [half for total in reversed(spare) for half in (total // 2, total - total // 2)]))


class _Block(nn.Module):
    """Inverted residual: expand, convolve each channel, project. Names are those of the published weights."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands, self.shortcut = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv, self._bn2 = nn.Conv2d(hidden, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(_same(self._depthwise_conv, y)))))
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """EfficientNet-lite0 with a head for `num_classes`; `features` gives what the head reads."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, _STEM, 3, 2, bias=False), _norm(_STEM)
        blocks, inputs = [], _STEM
        for expansion, outputs, count, stride, kernel in _STAGES:
            for number in range(count):
                blocks.append(_Block(inputs, outputs, expansion, stride if number == 0 else 1, kernel))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(inputs, FEATURES, 1, bias=False), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return features [B, 1280] of images [B, 3, H, W] with values in -1 .. 1."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = F.relu6(self._bn0(_same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self._fc(self.features(images))


def pretrained(folder: Path, num_classes: int) -> Lite0:
    """Return the network with its public weights and a head that is new."""
    model = Lite0(num_classes)
    weights = torch.load(folder / "weights.pth", map_location="cpu", weights_only=True)
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc")}, strict=False)
    return model


def finetuned(num_classes: int) -> nn.Module:
    """Build the network with public weights and frozen BatchNorm, all of it trained."""
    return dpquant.fix(pretrained(Path(os.environ[WEIGHTS]), num_classes), batch_norm="freeze")
