# SPDX-License-Identifier: Apache-2.0
"""Settings of a run's data and network: where records lie, how they are read, and what is trained on them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

AUGMENTS = ("none", "crop", "crop-flip")
PARTITIONS = ("even", "range")
Range = tuple[str, Callable[[Any], bool]]  # in words, and whether a value lies in it
SOURCE_RANGES: Mapping[str, Range] = {
    "image_size": ("in 1 .. 16384", lambda x: 1 <= x <= 16384),
    "views": ("in 1 .. 64", lambda x: 1 <= x <= 64),
    "workers": ("in 1 .. 64", lambda x: 1 <= x <= 64),
    "test_share": ("in (0, 1)", lambda x: 0 < x < 1),
    "max_length": ("in 1 .. 65536", lambda x: 1 <= x <= 65536),
    "lora": ("in 1 .. 4096", lambda x: 1 <= x <= 4096),
    "width": ("in (0, 10000]", lambda x: 0 < x <= 10_000),
}


def setting(help: str, default: Any = None, *, option: bool = True) -> Any:
    """Return a field of settings with its help and default, and whether the command line has it as an option."""
    return dataclasses.field(default=default, metadata={"help": help, "option": option})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Settings of data and network. `TrainSettings` has them and all others."""

    data: str = setting(
        "digits, fashion-mnist, mnist, emnist, cifar10, gtsrb, image-folder:PATH, table:FILE, text:FILE or packed:PATH",
        "digits",
    )
    data_dir: str | None = setting("folder that holds the data set's files")
    image_size: int | None = setting("side in pixels that images are resized to [32 if they differ in size]")
    normalize: str | None = setting(
        "of images: imagenet, or MEAN:STD of pixels in 0..1, each one number or one a channel with commas "
        "[0.5:0.5; MNIST's own]"
    )
    augment: str = setting(
        "of images: none, crop (random shifts), or crop-flip (also mirrored; not for digits or signs)", "none"
    )
    views: int | None = setting("random views of an image whose gradients are averaged before the clip [1]")
    partition: str = setting(
        "of several processes: even (all have the same data), or range: data stay on their machine, each has its own",
        "even",
    )
    workers: int | None = setting("threads that read packed records ahead of the model [1]")
    test: str | None = setting("of a table or texts: file of the test records")
    test_share: float | None = setting("of a table or texts, instead of test: share of the records, by their content")
    label_column: str | None = setting("of a table or texts: column of the label")
    spec: str | None = setting(
        "of a table: TOML file of what its columns hold, publicly known (dpquant init drafts it)"
    )
    text_column: str | None = setting("of texts: column of the text, or two with a comma for a pair")
    classes: str | None = setting("of texts: names of the classes, with commas between them; public")
    tokenizer: str | None = setting("of texts: folder with a tokenizer.json, or the file")
    max_length: int | None = setting("of texts: tokens at which they are cut [128]")
    model: str = setting(
        "cnn, lenet, resnet18, resnet18-cifar, resnet50, densenet121; mlp or tabular-resnet; embedding-mean or "
        "hf:PATH; or your own module:function"
    )
    width: float = setting("factor on the model's channels", 1.0)
    lora: int | None = setting("of hf:PATH: rank of adapters that are trained instead of the network")
    train_only: str | None = setting("patterns, as *classifier*, with commas, of the parameters that are trained")
    fix: bool = setting("replace BatchNorm by GroupNorm", False)
