# SPDX-License-Identifier: Apache-2.0
"""What messages are made of: the nearest known name, and the type of a wrong argument."""

import pytest

from dpquant.errors import DataError, DPQuantError, ModelError, SettingError, did_you_mean, expect, kind_of

NETWORKS = ("cnn", "resnet18", "resnet18-cifar", "mlp")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("resnet_18", "resnet18"), ("ResNet18-CIFAR", "resnet18-cifar"), ("cnm", "cnn"), ("four", "cnn"), ("vgg", None)],
)
def test_the_nearest_known_name_is_found(given, meant):
    found = did_you_mean(given, NETWORKS, {"four": "cnn"})
    assert found == ("" if meant is None else f"Did you mean {meant}? ")


def test_what_is_no_name_has_no_nearest_one():
    assert did_you_mean(3, NETWORKS) == did_you_mean(None, NETWORKS) == ""


@pytest.mark.parametrize(
    ("value", "words"), [(None, "None"), (3, "an int"), ("x", "a str"), (dict, "the class dict"), ([], "a list")]
)
def test_a_type_in_words(value, words):
    assert kind_of(value) == words


def test_an_argument_of_the_type_passes_and_a_bool_is_no_number():
    expect("x", 3, (int, float), "a number", "Give one")
    for value in (True, "3", None):
        with pytest.raises(SettingError, match=r"Expected x to be a number; got .*\. Give one\."):
            expect("x", value, (int, float), "a number", "Give one")
    with pytest.raises(ModelError):
        expect("x", 3, str, "a name", "Give one", ModelError)


def test_an_errors_message_does_not_show_the_value():
    with pytest.raises(DPQuantError) as caught:
        expect("x", "a secret", int, "a number", "Give one", DataError)
    assert "secret" not in str(caught.value)
