# SPDX-License-Identifier: Apache-2.0
"""Pixels reach the network by the constants that the settings name, in training, in packed records and afterwards."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dpquant.data.normalisation import NAMED, PLAIN, Normalisation, normalisation_of
from dpquant.data.pack import pack
from dpquant.errors import SettingError
from dpquant.runs.describing import normalisation_of as described
from dpquant.runs.description import ModelDescription
from dpquant.runs.held_out import held_out
from dpquant.runs.inputs import Reader
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from dpquant.runs.train import train
from sources import images

IMAGENET = NAMED["imagenet"]
EACH = "0.1,0.2,0.3:0.4,0.5,0.6"


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("0.5:0.25", 0.5, 0.25),
        (EACH, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        (" 0.1, 0.2, 0.3 : 0.5 ", (0.1, 0.2, 0.3), 0.5),
    ],
)
def test_constants_are_read(text, mean, std):
    assert normalisation_of(text) == Normalisation(mean=mean, std=std)


@pytest.mark.parametrize(
    "text", ["", "image", "0.5", "0.5:", ":0.5", "0.5:0", "0.5:-1", "0.5:nan", "a:b", "0.1,0.2:0.1,0.2,0.3", "1:2:3"]
)
def test_other_words_are_refused(text):
    with pytest.raises(SettingError, match="normalize"):
        TrainSettings.chosen({"normalize": text})


def expected(path, mean, std):
    """The input of torchvision's own transform."""
    with Image.open(path) as image:
        pixels = v2.functional.to_dtype(v2.functional.to_image(image.convert("RGB")), torch.float32, scale=True)
    return v2.Normalize(mean, std)(pixels)


def test_pixels_are_normalised_as_torchvision_does_in_training_packed_and_for_a_prediction(tmp_path):
    settings = TrainSettings.chosen({**images(tmp_path), "normalize": "imagenet"})
    file = tmp_path / "photos" / "test" / "bright" / "0.png"
    wanted = expected(file, IMAGENET.mean, IMAGENET.std)
    dataset = dataset_of(settings)
    first_bright = dataset.test.targets.tolist().index(0)  # classes are sorted by name
    assert torch.allclose(dataset.test[first_bright][0], wanted, atol=1e-5)
    pack(lambda store: dataset_of(settings, store), tmp_path / "packed")
    packed = dataset_of(TrainSettings.chosen({"data": f"packed:{tmp_path / 'packed'}"}))
    assert torch.equal(packed.test[first_bright][0], dataset.test[first_bright][0])
    record = train(settings, tmp_path / "run")
    assert RunRecord.read(tmp_path / "run" / "record.json") == record
    description = ModelDescription.read(tmp_path / "run" / "model.json")
    assert described(description) == IMAGENET
    assert record.source == {"normalisation": IMAGENET.fields}
    (part,) = Reader(tmp_path / "run", description).parts(str(file), None)
    assert torch.allclose(part.inputs[0], wanted, atol=1e-5)
    for name in (None, f"image-folder:{tmp_path / 'photos'}", f"packed:{tmp_path / 'packed'}"):
        found = held_out(tmp_path / "run", settings, description, name, strict=True)
        assert torch.allclose(found.batch(torch.tensor([first_bright]))[0][0], wanted, atol=1e-5), name
    planted = dataclasses.replace(description, normalisation=None)  # a description that lost them
    (part,) = Reader(tmp_path / "run", planted).parts(str(file), None)
    assert not torch.allclose(part.inputs[0], wanted, atol=1e-2)


def test_without_the_setting_the_constants_are_as_they_were(tmp_path):
    dataset = dataset_of(TrainSettings.chosen(images(tmp_path)))
    assert dataset.train.normalisation == PLAIN
    inputs = dataset.train.batch(torch.arange(3))[0]
    pixels = dataset.train.pixels[:3].float()
    assert torch.equal(inputs, pixels.mul(1.0 / (65_535 * 0.5)).sub(1.0))


def test_a_description_of_an_earlier_schema_has_one_constant(tmp_path):
    fields = {"schema": 2, "model": "cnn", "width": 1.0, "fix": False, "parameters": 1, "num_classes": 2}
    fields |= {"class_names": ["a", "b"], "input_shape": [1, 8, 8], "image_size": None}
    fields["normalisation"] = {"mean": 0.1307, "std": 0.3081}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    assert described(ModelDescription.read(tmp_path / "model.json")) == Normalisation(mean=0.1307, std=0.3081)
