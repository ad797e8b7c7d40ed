# SPDX-License-Identifier: Apache-2.0
"""What the privacy proof assumes, tried on the real code; and planted bugs, each of which its trial must catch.

Sensitivity on records that nobody would choose; sampling, clipping and noise measured at the far end of whole runs; and
non-interference: with the mechanisms' results held fixed, nothing that a run leaves behind may depend on its records.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from doubles import Told
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.registry import resolve
from dpquant.data import dataset as data
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import ClippedSum, clipped_sum
from dpquant.engine.passes import Objective
from dpquant.formats import precision, recipe
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.noise import NoiseSource
from dpquant.rounding import row_keys
from dpquant.runs.directory import RunDirectory, append_line
from dpquant.runs.names import METRICS, RECORD
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.execution import ExecutionRequest
from dpquant.training.impact import ImpactSum, analysis_keys, impact_sum
from dpquant.training.private import PrivateTraining
from dpquant.training.start import Request, begin
from mechanisms import begun, finish, with_doubles
from networks import loss, zoo

Z = 4.9  # a standard normal lies farther out with probability 1e-6


def flat(grads):
    return torch.cat([g.double().flatten() for g in grads.values()])


# Sensitivity: each example's part is at most C, and the sum is that of its parts. Both together bound what one record
# can move, for every data set.


@st.composite
def nasty_images(draw):
    """A few images: tiny, ordinary, huge, blank, repeated, denormal, flat or not finite."""
    count = draw(st.integers(0, 6))
    kinds = draw(st.lists(st.sampled_from(["normal", "flat", "spike", "nan", "inf"]), min_size=count, max_size=count))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e3, 1e6]), min_size=count, max_size=count))
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    for image, kind, size in zip(images, kinds, sizes, strict=True):
        if kind == "flat":
            image.fill_(1.0)
        elif kind == "spike":
            image[0, 3, 4] = 1e4
        image *= size
        if kind in ("nan", "inf"):
            image[0, 0, 0] = float(kind)
    return images, torch.tensor([draw(st.integers(0, 4)) for _ in range(count)], dtype=torch.int64)


def quantized(name, format):
    model = dpquant.prepare(zoo()[name][0], format=format)
    dpquant.set_policy(model, dpquant.quantizable_layers(model))
    return model


NETS = {
    (name, format): quantized(name, format)
    for name in ("strided", "residual")
    for format in ("luq-fp4", "luq", "int4-clip", "int8", "mxfp4", "nvfp4")
}


def clipped(model, batch, max_grad_norm=1.0):
    """rows -> their clipped sum; records keep their ids whatever company they are in."""

    def summed(rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        part = tuple(t[rows] for t in batch)
        out = clipped_sum(model, loss, part, max_grad_norm=max_grad_norm, record_ids=rows, step=0, seed=0)
        return flat(out.grads)

    return summed


def assert_a_sum_of_parts_of_at_most(bound, summed, count):
    whole, parts = summed(range(count)), [summed([i]) for i in range(count)]
    assert summed([]).abs().max() == 0
    assert all(part.norm() <= bound * (1 + 1e-6) for part in parts)
    assert (whole - sum(parts, torch.zeros_like(whole))).norm() <= 1e-4 * bound * max(count, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETS)), nasty_images())
def test_clipped_gradients_are_a_sum_of_bounded_parts_whatever_the_records(net, batch):
    assert_a_sum_of_parts_of_at_most(1.0, clipped(NETS[net], batch), len(batch[1]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETS)), nasty_images())
def test_clipped_impacts_are_a_sum_of_bounded_parts_whatever_the_records(net, batch):
    model = NETS[net]
    names = list(dpquant.quantizable_layers(model))

    def summed(rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        part = tuple(t[rows] for t in batch)
        pieces = microbatches(part, rows, 8)
        out = impact_sum(Objective(model, loss), pieces, names=names, max_norm=0.2, keys=analysis_keys(0, 0, 2))
        return out.impacts

    assert_a_sum_of_parts_of_at_most(0.2, summed, len(batch[1]))


def mean_over_the_batch(summed):
    return lambda rows: summed(rows) / max(len(rows), 1)


def quantized_once_more(summed):
    """A second quantization, after the clip, with the sum's own scale."""

    def planted(rows):
        total = summed(rows).float()[None]
        role = recipe("luq-fp4").gradient
        return quantize_rows(total, role, row_keys(7, torch.zeros(1).long())).dequantize()[0]

    return planted


def clipped_after_adding(summed):
    return lambda rows: (total := summed(rows)) / max(total.norm().item(), 1.0)


@pytest.mark.parametrize("planted", [mean_over_the_batch, quantized_once_more, clipped_after_adding])
def test_a_sum_that_is_not_one_of_bounded_parts_is_caught(planted):
    batch = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    honest = clipped(NETS["strided", "luq-fp4"], batch)
    assert_a_sum_of_parts_of_at_most(1.0, honest, 6)
    with pytest.raises(AssertionError):
        assert_a_sum_of_parts_of_at_most(1.0, planted(honest), 6)


# Noise and canaries: what comes out of whole runs.


def run_of(model, records, *, steps=1, sample_rate=0.1, policy=None, max_grad_norm=0.5, loss_fn=loss, parts=None):
    """What a run with doubles of its mechanism has moved its parameters by, times the batch size."""
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.3, delta=1e-5, max_grad_norm=max_grad_norm, sample_rate=sample_rate,
        expected_batch_size=sample_rate * len(records), steps=steps,
    )  # fmt: skip
    doubles = dict(parts or {})
    make_run = doubles.pop("make_run", PrivateTraining)
    mechanism = with_doubles(Mechanism.repeatable(3, None), **doubles)
    run = begun(
        model, records, loss_fn=loss_fn, plan=plan, policy=policy or dpquant.NonePolicy(), mechanism=mechanism, lr=1.0,
        make_run=make_run,
    )  # fmt: skip
    before = [p.detach().clone() for p in run.model.parameters()]
    finish(run)
    moved = [old - new.detach() for old, new in zip(before, run.model.parameters(), strict=True)]
    return torch.cat([m.double().flatten() for m in moved]) * plan.expected_batch_size


def noise_of_blank_records(**parts):
    """Records without a gradient leave a step of noise alone: 200 000 entries, in units of the promised deviation."""
    model = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 100, bias=False))
    records = TensorDataset(torch.zeros(40, 400), torch.zeros(40).long())
    return run_of(model, records, parts=parts) / (1.3 * 0.5)


def assert_standard_normal(noise):
    n = len(noise)
    assert abs(noise.mean().item()) * n**0.5 < Z
    assert abs(noise.square().mean().item() - 1) / (2 / n) ** 0.5 < Z
    assert abs(noise.pow(4).mean().item() - 3) / (96 / n) ** 0.5 < Z


def test_a_step_adds_gaussian_noise_of_the_promised_size_to_every_parameter():
    assert_standard_normal(noise_of_blank_records())


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_noise_that_is_off_by_two_in_a_hundred_is_caught(factor):
    noise = noise_of_blank_records(gaussian=lambda honest, shape, std, **k: honest(shape, factor * std, **k))
    with pytest.raises(AssertionError):
        assert_standard_normal(noise)


CANARIES, STEPS, RATE = 2000, 20, 0.1


def steep_linear_loss(model, batch):
    return 100 * model(batch[0]).squeeze(1)


def canary_sums(policy, parts=None):
    """Canary i pulls weight i alone, far beyond the clip norm; every other one is in the data."""
    torch.manual_seed(0)
    records = TensorDataset(torch.eye(CANARIES)[::2], torch.zeros(CANARIES // 2))
    model = nn.Linear(CANARIES, 1, bias=False)
    return run_of(
        model, records, steps=STEPS, sample_rate=RATE, policy=policy, max_grad_norm=1.0, loss_fn=steep_linear_loss,
        parts=parts,
    )  # fmt: skip


def assert_canaries_are_heard_as_promised(sums):
    """Absent: N(0, T sigma^2 C^2). Present: the same plus C times a binomial number of T draws at rate q."""
    absent, present = sums[1::2], sums[::2]
    n, variance, binomial = len(absent), STEPS * 1.3**2, STEPS * RATE * (1 - RATE)
    assert abs(absent.mean().item()) / (variance / n) ** 0.5 < Z
    assert abs(absent.var().item() / variance - 1) / (2 / n) ** 0.5 < Z
    assert abs(present.mean().item() - STEPS * RATE) / ((variance + binomial) / n) ** 0.5 < Z


@pytest.mark.parametrize("policy", [dpquant.NonePolicy(), dpquant.AllPolicy()], ids=["full", "quantized"])
def test_canaries_are_heard_as_loudly_as_the_accounting_assumes(policy):
    assert_canaries_are_heard_as_promised(canary_sums(policy))


class GradientsTimesThree(PrivateTraining):
    def _clipped_sum(self, pieces, key):
        out = super()._clipped_sum(pieces, key)
        return dataclasses.replace(out, grads={name: 3 * grad for name, grad in out.grads.items()})


LOUDER = {
    "half the noise": {"gaussian": lambda honest, shape, std, **k: honest(shape, std / 2, **k)},
    "gradients times three": {"make_run": GradientsTimesThree},
    "a higher rate than charged": {"draw": lambda honest, n, rate, **k: honest(n, 2 * rate, **k)},
}


@pytest.mark.parametrize("parts", LOUDER.values(), ids=LOUDER)
def test_canaries_that_are_heard_louder_are_caught(parts):
    sums = canary_sums(dpquant.NonePolicy(), parts)
    with pytest.raises(AssertionError):
        assert_canaries_are_heard_as_promised(sums)


# Non-interference: all private computation runs, but its results are replaced by constants. Times are in timings.json
# and on the screen, which are the operator's, and nowhere else.


def what_the_screen_shows(progress):
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "examples_per_second"}


def what_a_line_says(line):
    """A line of the ledger without the run's random name, from which its hashes follow."""
    return {name: value for name, value in line.items() if name not in ("run", "previous", "hash")}


class Silent(PrivateTraining):
    """Computes on private records, and puts constants in the place of what comes of it."""

    def _clipped_sum(self, pieces, key):
        total = super()._clipped_sum(pieces, key)
        return ClippedSum({name: torch.zeros_like(grad) for name, grad in total.grads.items()}, total.sensitivity)

    def _impact_sum(self, pieces, names, keys):
        total = super()._impact_sum(pieces, names, keys)
        return ImpactSum(torch.zeros_like(total.impacts), total.sensitivity)


def starting(make_run):
    """Begins a run of a kind, as `make_private` does, under noise that is the same in every run."""

    def start(
        model, optimizer, train_set, *, ledger, format, rest, backend, microbatch_size, memory, resume, **keywords
    ):
        wanted = ExecutionRequest(
            chosen=precision(format), rest=precision(rest), backend=backend, microbatch_size=microbatch_size,
            memory=memory,
        )  # fmt: skip
        request = Request(model=model, optimizer=optimizer, train_set=train_set, execution=wanted, **keywords)
        constant = NoiseSource.from_seed(0).gaussian
        noisy = functools.partial(with_doubles, gaussian=lambda honest, *a, **k: constant(*a, **k))
        return begin(request, lambda seconds: noisy(Mechanism.secret(ledger)), make_run=make_run)

    return start


def as_lists(value):
    """Nested tensors as nested lists."""
    match value:
        case torch.Tensor():
            return value.tolist()
        case Mapping():
            return {key: as_lists(one) for key, one in value.items()}
        case list() | tuple():
            return [as_lists(one) for one in value]
        case _:
            return value


def left_behind(out, settings, *, make_run=Silent, directory=RunDirectory):
    """Everything that a run leaves behind or says, less what is its operator's."""
    told = Told()
    record = train(TrainSettings.chosen(settings), out, sinks=[told], directory=directory, start=starting(make_run))
    files = {path.name: path for path in out.iterdir()}
    return {
        "files": sorted(files),
        "config": files["config.toml"].read_bytes(),
        "ledger": [what_a_line_says(json.loads(line)) for line in files["ledger.jsonl"].read_text().splitlines()],
        "choices": json.loads(files["choices.json"].read_text()),
        "metrics": [json.loads(line) for line in files["metrics.jsonl"].read_text().splitlines()],
        "record": json.loads(files["record.json"].read_text()),
        "checkpoints": {one.name: as_lists(Checkpoint.read(one).parts) for one in files["checkpoints"].iterdir()},
        "weights": {name: t.tolist() for name, t in load_file(files["model.safetensors"]).items()},
        "progress": [what_the_screen_shows(progress) for progress in told.of("stepped")],
        "told": [(method, what) for method, what in told.all if method != "stepped"],
        "statement": record.statement,
    }


def two_data_sets():
    """Two private data sets: other pixels, labels and numbers of records; some of the first cannot be read."""
    real = data.load("digits").train
    generator = torch.Generator().manual_seed(0)
    random_pixels = torch.randint(0, 9, (300, *real.pixels.shape[1:]), generator=generator, dtype=torch.uint8)
    first = random_pixels, torch.full((300,), 3), torch.arange(300) % 7 > 0
    return first, (real.pixels[:280], real.targets[:280], torch.ones(280, dtype=torch.bool))


def put_images(folder, records):
    """Private records as an image folder, in the place of those that were there; the test set is public."""
    shutil.rmtree(folder, ignore_errors=True)
    public = data.load("digits").test
    tests = public.pixels[:50], public.targets[:50], torch.ones(50, dtype=torch.bool)
    for part, (pixels, targets, readable) in (("train", records), ("test", tests)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for number in range(len(targets)):
            path = folder / part / str(int(targets[number])) / f"{number}.png"
            if readable[number]:
                Image.fromarray((14 * pixels[number].squeeze()).numpy()).save(path)
            else:
                path.write_bytes(b"torn")


def assert_no_interference(tmp_path, **planted):
    images, choices = tmp_path / "images", tmp_path / "choices.json"
    settings = {
        "data": f"image-folder:{images}", "model": "cnn", "epochs": 2, "batch_size": 32.0, "sample_rate": 0.2,
        "lr": 0.01, "microbatch_size": 64, "backend": resolve("auto", [precision("luq-fp4")], torch.device("cpu")).name,
        "unsafe_metrics": planted.pop("unsafe_metrics", False),
        "checkpoint_every": planted.pop("checkpoint_every", "1epoch"),
    }  # fmt: skip
    one, other = two_data_sets()
    put_images(images, one)
    left_behind(tmp_path / "measured", settings)  # timings of one run decide in both
    shutil.copy(tmp_path / "measured" / "choices.json", choices)
    found = []
    for name, records in (("a", one), ("b", other)):
        put_images(images, records)
        found.append(left_behind(tmp_path / name, {**settings, "choices": str(choices)}, **planted))
    first, second = found
    assert first["record"]["steps"] == 10 and len(first["progress"]) == 10
    for what, value in first.items():
        assert value == second[what], what


def test_what_a_run_leaves_behind_depends_on_its_records_through_the_mechanisms_only(tmp_path):
    assert_no_interference(tmp_path)


class TellingTheSize(Silent):
    """The size of the batch in the place of the sum."""

    def _clipped_sum(self, pieces, key):
        pieces = list(pieces)
        total, size = super()._clipped_sum(pieces, key), sum(piece.num_examples for piece in pieces)
        return ClippedSum({name: torch.full_like(grad, size) for name, grad in total.grads.items()}, total.sensitivity)


class TellingTheGradients(Silent):
    def _clipped_sum(self, pieces, key):
        return PrivateTraining._clipped_sum(self, pieces, key)


class KeepingSome(Silent):
    """A buffer that takes in the data."""

    def _clipped_sum(self, pieces, key):
        pieces = list(pieces)
        self.model.register_buffer("seen", torch.stack([piece.data[0].mean() for piece in pieces]).nan_to_num()[:1])
        return super()._clipped_sum(pieces, key)


@pytest.mark.parametrize(
    "planted",
    [{"make_run": TellingTheSize}, {"make_run": TellingTheGradients}, {"unsafe_metrics": True}],
    ids=["batch size", "gradients", "training accuracy"],
)
def test_interference_is_caught(planted, tmp_path):
    with pytest.raises(AssertionError):
        assert_no_interference(tmp_path, **planted)


@pytest.mark.parametrize("every", ["1epoch", "1step"])
def test_a_buffer_that_takes_in_the_data_ends_the_run_and_is_not_kept(every, tmp_path):
    with pytest.raises(dpquant.ModelError, match="buffer seen has begun to change"):
        assert_no_interference(tmp_path, make_run=KeepingSome, checkpoint_every=every)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("choices.json", "config.toml", "ledger.jsonl", "records.json", "checkpoints")
    }
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000000"]


class SecondsInTheMetrics(RunDirectory):
    def keep(self, model, choices, timings):
        super().keep(model, choices, timings)
        append_line(self.path / METRICS, json.dumps({"seconds": time.perf_counter()}))


class SecondsInTheRecord(RunDirectory):
    def end(self, record, timings):
        super().end(record, timings)
        fields = json.loads(record.to_json())
        (self.path / RECORD).write_text(json.dumps({**fields, "seconds": time.perf_counter()}))


@pytest.mark.parametrize("planted", [SecondsInTheMetrics, SecondsInTheRecord])
def test_a_clock_in_what_is_released_is_caught(planted, tmp_path):
    with pytest.raises(AssertionError):
        assert_no_interference(tmp_path, directory=planted)
