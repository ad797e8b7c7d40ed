# SPDX-License-Identifier: Apache-2.0
"""What the process allows float32 products is changed within a block and is afterwards as the user had it."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from dpquant.backends.precision import bfloat16_factors, ieee_float32, input_error, tf32_float32

BLOCKS = {ieee_float32: "ieee", tf32_float32: "tf32"}

# (attribute of torch.backends, value), in the order in which a user sets them
NEW = [
    (),
    (("fp32_precision", "tf32"),),
    (("fp32_precision", "ieee"),),
    (("cudnn.fp32_precision", "tf32"), ("cuda.matmul.fp32_precision", "tf32")),
    (("cudnn.fp32_precision", "ieee"), ("cudnn.conv.fp32_precision", "tf32")),
    (("fp32_precision", "bf16"), ("cudnn.rnn.fp32_precision", "ieee"), ("mkldnn.matmul.fp32_precision", "ieee")),
]
OLD = [
    (),
    (("cuda.matmul.allow_tf32", True),),
    (("cudnn.allow_tf32", False),),
    (("cuda.matmul.allow_tf32", True), ("cudnn.allow_tf32", False)),
    (("cuda.matmul.allow_tf32", False), ("cudnn.allow_tf32", True)),
]
PROGRAM = """
import json, os, sys
import torch
from dpquant.backends import precision

PLACES = ("fp32_precision", *(f"{place}.fp32_precision" for place in (
    "cudnn", "cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")))
OLDER = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32", "cudnn.deterministic", "cudnn.benchmark")

def owner(path):
    *names, last = path.split(".")
    place = torch.backends
    for name in names:
        place = getattr(place, name)
    return place, last

def get(path):
    try:
        return getattr(*owner(path))
    except RuntimeError:  # torch's own, where older and newer settings contradict each other
        return "mixed"

def put(path, value):
    setattr(*owner(path), value)

def seen():
    '''All settings now, and as they are once the general ones have been changed: which of them inherit shows there.'''
    found = [[get(path) for path in (*PLACES, *OLDER)]]
    general = get("fp32_precision")
    for value in ("ieee", "tf32", "none"):
        put("fp32_precision", value)
        found.append([get(path) for path in PLACES])
    put("fp32_precision", general)
    return found

def check(settings):
    for path, value in settings:
        put(path, value)
    before = seen()
    for name in ("ieee_float32", "tf32_float32", "bfloat16_factors"):
        for inner in (None, "ieee_float32", "tf32_float32", "bfloat16_factors"):
            with getattr(precision, name)():
                if name == "ieee_float32" and inner is None:
                    assert {get(path) for path in PLACES} == {"ieee"}
                if name == "tf32_float32" and inner is None:
                    assert {get(path) for path in PLACES[:5]} == {"tf32"}
                    assert get("cudnn.deterministic") and not get("cudnn.benchmark")
                if inner is not None:
                    with getattr(precision, inner)():
                        pass
            assert seen() == before, (settings, name, inner, before, seen())

for settings in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        check(settings)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_settings_are_afterwards_as_they_were():
    """Of older and newer ways to set them, and also of what inherits; each in a process, as they cannot be unset."""
    cases = [order for old, new in itertools.product(OLD, NEW) for order in (old + new, new + old)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(cases)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-2000:]


@pytest.mark.parametrize("block", BLOCKS)
def test_settings_are_restored_after_an_error(block):
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.deterministic
    with pytest.raises(ZeroDivisionError), block():
        assert torch.backends.cuda.matmul.fp32_precision == BLOCKS[block]
        raise ZeroDivisionError
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.deterministic) == before


def test_it_is_known_how_inputs_are_rounded():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with ieee_float32():
        assert input_error(cpu) == input_error(gpu) == 0
        with tf32_float32():
            assert input_error(gpu) == 2**-11
        with bfloat16_factors():
            assert (input_error(cpu), input_error(gpu)) == (2**-8, 0)
