# SPDX-License-Identifier: Apache-2.0
"""Sides that are wrong on purpose are found and not timed; sides that are right are timed; the record holds it all."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from dpquant.app import bench
from dpquant.app.bench import BenchRecord, BenchSettings, Oracle, SideResult, Spread, gradient_of, measure, summed
from dpquant.app.cli import run
from dpquant.app.contenders import SIDES
from dpquant.app.networks import NETWORKS, build_network, out_of_place, synthetic_batch
from dpquant.app.verbs.bench import report_bench
from dpquant.errors import FormatError, ModelError, SettingError
from dpquant.machine import Hardware, instructions_in

# Opacus warns of its hooks at every step; `measure` silences that, the parts of it that are tested here do not.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Secure RNG turned off")

TINY = BenchSettings(model="cnn", batch_size=6, image_size=8, rounds=1, threads=1)


@pytest.fixture(scope="module")
def record() -> BenchRecord:
    """One round of the smallest network, all sides."""
    return measure(TINY)


def test_every_side_is_right_and_timed(record):
    assert {name: side.status for name, side in record.sides.items()} == dict.fromkeys(SIDES, "measured")
    assert all(side.ms_per_example is not None and side.ms_per_example.median > 0 for side in record.sides.values())
    assert set(record.ratios) == {f"{a}/{b}" for a, b in bench.RATIOS}
    assert record.wrong == () and record.threads == 1


def test_full_precision_and_opacus_agree_with_the_loop(record):
    assert all(record.sides[name].error < 1e-4 for name in ("plain", "opacus", "ghost", "full"))


# Sides that are wrong on purpose


def told_otherwise(name, **factors):
    """A side that takes some settings for other than they are."""

    def make(model, batch, settings):
        changed = {field: getattr(settings, field) * factor for field, factor in factors.items()}
        return SIDES[name](model, batch, dataclasses.replace(settings, **changed))

    return make


def noisy(model, batch, settings):
    return SIDES["opacus"](model, batch, dataclasses.replace(settings, noise_multiplier=0.01))


def loses_a_record(model, batch, settings):
    """Right for one example; of several, the last is left out."""
    kept = slice(max(1, len(batch[1]) - 1))
    lr = settings.lr * len(batch[1][kept]) / len(batch[1])
    return SIDES["full"](model, tuple(part[kept] for part in batch), dataclasses.replace(settings, lr=lr))


def bound_of_the_batch(model, batch, settings):
    """Right for one example; of several, the largest value moves the clip norm of all."""
    factor = float(batch[0].abs().max()) / 4 if len(batch[1]) > 1 else 1.0
    return SIDES["all"](model, batch, dataclasses.replace(settings, max_grad_norm=settings.max_grad_norm * factor))


def uphill(model, batch, settings):
    step, before = SIDES["all"](model, batch, settings), [p.detach().clone() for p in model.parameters()]

    def backwards():
        step()
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), before, strict=True):
                parameter.copy_(2 * start - parameter)

    return backwards


WRONG = {
    "no clipping": ("full", told_otherwise("full", max_grad_norm=1e9), "above the bound"),
    "no clipping in Opacus": ("opacus", told_otherwise("opacus", max_grad_norm=1e9), "above the bound"),
    "no clipping of codes": ("all", told_otherwise("all", max_grad_norm=1e9), "above the bound"),
    "a clip norm one per mille too small": ("full", told_otherwise("full", max_grad_norm=0.999), "of an example"),
    "a longer step": ("plain", told_otherwise("plain", lr=1.001), "of an example"),
    "noise": ("opacus", noisy, ""),
    "a lost record": ("full", loses_a_record, "over a batch"),
    "a clip norm of the batch": ("all", bound_of_the_batch, "another record"),
    "a step uphill": ("all", uphill, "cosine"),
}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(build_network("cnn", 8), synthetic_batch("cnn", 8, 6), TINY.of_step)


@pytest.mark.parametrize(("name", "make", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_side_is_found(name, make, said, oracle):
    reason, _ = oracle.judge(name, make)
    assert reason and said in reason


@pytest.mark.parametrize("name", SIDES)
def test_a_right_side_is_not_accused(name, oracle):
    assert oracle.judge(name, SIDES[name])[0] == ""


def test_a_wrong_side_is_reported_and_not_timed():
    sides = {"plain": SIDES["plain"], "full": told_otherwise("full", max_grad_norm=0.5)}
    record = measure(TINY, sides=sides)
    assert record.wrong == ("full",) and record.sides["full"].ms_per_example is None
    assert record.ratios == {} and "wrong: its gradient" in record.table()[2][-1]


def test_a_side_that_does_not_run_says_why():
    def broken(model, batch, settings):
        raise NotImplementedError("no such layer\nand a second line")

    record = measure(TINY, sides={"plain": SIDES["plain"], "ghost": broken})
    assert record.sides["ghost"] == SideResult(status="does not run", reason="NotImplementedError: no such layer")
    assert record.sides["plain"].status == "measured" and record.wrong == ()


def test_without_opacus_the_other_sides_are_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    record = measure(TINY, sides={name: SIDES[name] for name in ("plain", "opacus", "full")})
    assert record.sides["opacus"].status == "does not run"
    assert record.sides["opacus"].reason == "Opacus is not installed: pip install 'dpquant[bench]'"
    assert record.sides["full"].status == "measured"


def test_the_loop_is_the_definition_of_a_clipped_sum():
    network, batch = build_network("cnn", 8), synthetic_batch("cnn", 8, 3)
    gradients = [gradient_of(network, tuple(part[i : i + 1] for part in batch)) for i in range(3)]
    bound = sorted(float(g.norm()) for g in gradients)[1]
    expected = sum(g * min(1.0, bound / float(g.norm())) for g in gradients)
    torch.testing.assert_close(summed(network, batch, bound), expected)
    torch.testing.assert_close(summed(network, batch, math.inf), sum(gradients))


# Timing, memory, the record


def test_every_side_goes_first_in_turn():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = bench._timed(steps, 2, lambda what: None)
    assert "".join(order) == "abcbcacab" and {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_spread_holds_median_and_quartiles():
    assert Spread.of([3.0]) == Spread(low=3.0, median=3.0, high=3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(low=2.0, median=3.0, high=4.0)


def test_a_side_that_holds_more_has_a_higher_peak():
    settings = BenchSettings(model="cnn", batch_size=64, image_size=64, threads=1)
    small, large = (bench.peak_mib(dataclasses.replace(settings, batch_size=size), "plain") for size in (1, 128))
    assert small is not None and large is not None and large > small + 20


def test_the_record_is_json_and_names_the_machine(record):
    fields = json.loads(record.to_json())
    assert fields["settings"]["batch_size"] == 6 and fields["sides"]["full"]["status"] == "measured"
    assert fields["hardware"]["cpu"] and fields["hardware"]["torch"] == torch.__version__.split("+")[0]


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ModelError, match="resnet18-cifar"):
        BenchSettings(model="resnet19")
    with pytest.raises(FormatError):
        BenchSettings(format="fp3")
    with pytest.raises(SettingError, match="rounds"):
        BenchSettings(rounds=0)
    with pytest.raises(SettingError, match="image_size"):
        measure(BenchSettings(model="densenet121", image_size=16))
    with pytest.raises(SettingError, match=r"image_size=16\. This one takes no images"):
        measure(BenchSettings(model="mlp", image_size=16))


def test_a_network_of_tables_is_checked_and_timed_on_rows():
    record = measure(BenchSettings(model="mlp", batch_size=6, rounds=1, threads=1))
    assert {name: side.status for name, side in record.sides.items()} == dict.fromkeys(SIDES, "measured")
    assert record.settings.image_size is None and record.settings.physical_batch_size == 4096


def test_what_is_not_given_is_the_networks_own():
    of_images, of_tables = BenchSettings(model="cnn"), BenchSettings(model="mlp")
    assert (of_images.batch_size, of_images.image_size, of_images.physical_batch_size) == (32, 28, 32)
    assert (of_tables.batch_size, of_tables.image_size, of_tables.physical_batch_size) == (4096, None, 4096)


def test_hardware_names_what_decides_speed():
    assert instructions_in("fpu avx2 sse avx512_vnni amx_int8") == ("amx_int8", "avx512_vnni", "avx2")
    here = Hardware.here()
    assert here.cores >= 1 and here.torch and here.slug == here.slug.lower()
    assert dataclasses.replace(here, cpu="Intel(R) Xeon(R) CPU E5 @ 2GHz").slug == "intel-xeon-e5"


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (1.5, True), (None, False)])
def test_a_busy_machine_is_noticed(load, busy):
    assert dataclasses.replace(Hardware.here(), cores=2, load=load).busy is busy


# The networks


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet18-cifar"])
def test_opacus_gets_the_same_network(name):
    """Without in-place operations, the function is the same."""
    image_size = NETWORKS[name].image_size and NETWORKS[name].smallest
    network = build_network(name, image_size)
    inputs, _, _ = synthetic_batch(name, image_size, 2)
    with torch.no_grad():
        expected = network(inputs)
        torch.testing.assert_close(out_of_place(network)(inputs), expected)


# The verb


def test_the_verb_prints_one_table(capsys, tmp_path):
    arguments = ["bench", "--model", "cnn", "--image-size", "8", "--batch-size", "4", "--rounds", "1"]
    assert run([*arguments, "--out", str(tmp_path / "bench.json")]) == 0
    captured = capsys.readouterr()
    assert "ours, full" in captured.out and "Opacus, ghost" in captured.out and "round 1 of 1" in captured.err
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["model"] == "cnn"


@pytest.mark.parametrize(("status", "code"), [("wrong", 1), ("measured", 0), ("does not run", 0)])
def test_the_exit_code_says_whether_a_side_is_wrong(status, code, capsys, record):
    found = dataclasses.replace(record, sides={"x": SideResult(status=status)})
    assert report_bench(found, None, as_json=True) == code
    assert json.loads(capsys.readouterr().out)["sides"]["x"]["status"] == status


@pytest.mark.parametrize("wrong", [["--model", "resnet19"], ["--rounds", "0"], ["--out", "/nowhere/x.json"]])
def test_bad_input_is_refused_before_anything_runs(wrong, capsys):
    assert run(["bench", *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
