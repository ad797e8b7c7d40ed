# SPDX-License-Identifier: Apache-2.0
"""Models, losses, collate functions and data that people bring: the right value, or one refusal that names the cause.

Each case was once reported about some tool for private training. Right value: the clipped sum of plain autograd, one
example at a time. A refusal comes before anything is charged. What goes wrong with one record only, in the middle of a
run, changes what that record contributes and nothing else.
"""

import collections
import copy
import hashlib
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, default_collate
from torchvision.ops import StochasticDepth

import dpquant
from dpquant.errors import DPQuantError, ModelError

BOUND = 0.05
RECORDS = 24


def labels(classes=3, count=RECORDS):
    return torch.randint(0, classes, (count,))


def loss(model, batch):
    return F.cross_entropy(model(*batch[:-1]), batch[-1], reduction="none")


def mlp(inputs=6, outputs=3):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def records_of(batch):
    return list(zip(*batch, strict=True))


def plan_of(steps=2, rate=0.5, noise=1.0, records=RECORDS):
    return dpquant.PrivacyPlan(
        noise_multiplier=noise, delta=1e-5, max_grad_norm=1.0, sample_rate=rate, expected_batch_size=rate * records,
        steps=steps,
    )  # fmt: skip


def start(model, data, loss_fn=loss, *, steps=2, rate=0.5, noise=1.0, optimizer=None, quantized=False, **settings):
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = {"microbatch_size": 8, "backend": "simulate", **settings}
    return dpquant.make_private(
        model,
        torch.optim.SGD(trainable, lr=0.1) if optimizer is None else optimizer,
        data,
        loss_fn=loss_fn,
        plan=plan_of(steps, rate, noise, len(data)),
        policy=dpquant.AllPolicy() if quantized else dpquant.NonePolicy(),
        **settings,
    )


def finish(run):
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
    return run


def weights_of(run):
    return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])


def summed(model, loss_fn, batch, rows, *, clipped_sum=dpquant.clipped_sum, **settings):
    """The clipped sum of some rows, as one vector by parameter name."""
    piece = tuple(leaf[rows] for leaf in batch)
    settings = {"record_ids": torch.tensor(rows), "seed": 0, "microbatch_size": len(rows), **settings}
    grads = clipped_sum(model, loss_fn, piece, max_grad_norm=BOUND, step=0, **settings).grads
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def one_by_one(model, loss_fn, batch, rows):
    """The same by plain autograd over single examples."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    total = 0.0
    for row in rows:
        value = loss_fn(model, tuple(leaf[[row]] for leaf in batch)).sum()
        found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g.to_dense() for g, (_, p) in zip(found, named, strict=True)]
        flat = torch.cat([g.flatten() for g in found]).double()
        total = total + flat * min(1.0, BOUND / max(flat.norm().item(), 1e-30))
    return total


def assert_right_value(model, batch, loss_fn=loss, *, runs=True, rows=6, clipped_sum=dpquant.clipped_sum):
    """A run takes two steps, and the clipped sum is that of a loop over single examples."""
    rows = list(range(rows))
    wanted = one_by_one(model, loss_fn, batch, rows)
    got = summed(dpquant.prepare(model), loss_fn, batch, rows, clipped_sum=clipped_sum)
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    if runs:
        assert finish(start(model, records_of(batch), loss_fn)).steps_taken == 2


def assert_refused(words, model, data, loss_fn=loss, **settings):
    """One error, before anything is charged, that says the cause."""
    with pytest.raises(DPQuantError, match=words):
        start(model, data if isinstance(data, list | Dataset) else records_of(data), loss_fn, **settings)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Models and losses that give the right value.


class Positions(nn.Module):
    """Learnt positions, for each example or broadcast over them."""

    def __init__(self, expanded):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 6), nn.Embedding(8, 6), nn.Linear(6, 3)
        self.expanded = expanded

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        places = self.places(places.expand_as(ids) if self.expanded else places[None])
        return self.head(torch.tanh(self.words(ids) + places).mean(1))


class Views(nn.Module):
    """Several views of a record on a second axis, folded into the first inside."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x_BKD):
        return self.head(torch.tanh(self.body(x_BKD)).mean(1))


class Graph(nn.Module):
    """A convolution over a graph that all records share."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)
        self.register_buffer("graph", torch.rand(5, 5))

    def forward(self, x_BND):
        return self.b(torch.tanh(self.graph @ self.a(x_BND))).mean(1)


class Variational(nn.Module):
    def __init__(self, last=nn.Identity):
        super().__init__()
        self.encode, self.decode, self.last = nn.Linear(6, 4), nn.Linear(2, 6), last()

    def forward(self, x, at_random):
        mean, log_variance = self.encode(x).chunk(2, 1)
        code = mean + (torch.randn_like(mean) * (log_variance / 2).exp() if at_random else 0)
        return self.last(self.decode(code)), mean, log_variance


def elbo(rebuilt, at_random=False):
    def loss(model, batch):
        out, mean, log_variance = model(batch[0], at_random)
        return rebuilt(out, batch[0]).sum(1) + 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)

    return loss


def bce(function):
    return lambda out, x: function(out, x, reduction="none")


class Packed(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)
        for frozen in (self.table, self.lstm):
            frozen.requires_grad_(trained)

    def forward(self, ids, lengths=None):
        lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        out = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])[0]
        return self.head(out.sum(1))


class LowRank(nn.Linear):
    """As in loralib: a frozen weight, and two small factors of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class LabelAttention(nn.Module):
    """Scores of labels; the table is used by a call or by its weight."""

    def __init__(self, by_call):
        super().__init__()
        self.body, self.labels, self.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
        self.by_call = by_call

    def forward(self, x_BTD):
        h = torch.tanh(self.body(x_BTD))
        scores = self.labels(h) if self.by_call else h @ self.labels.weight.T
        return self.head((scores.softmax(1).transpose(1, 2) @ h).mean(1))


def discriminator_loss(model, batch):
    real, fake = model(batch[0]).squeeze(1), model(batch[1]).squeeze(1)
    return F.softplus(-real) + F.softplus(fake)


class Pool(nn.Module):
    """Attention pooling by a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(6))

    def forward(self, x, mask=None):
        scores = x @ self.query
        scores = scores if mask is None else scores.masked_fill(mask, -1e9)
        return (scores.softmax(1)[..., None] * x).sum(1)


class Masked(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        self.pool, self.head, self.by_keyword = Pool(), nn.Linear(6, 3), by_keyword

    def forward(self, x, mask):
        return self.head(self.pool(x, mask=mask) if self.by_keyword else self.pool(x, mask))


class Volumes(nn.Module):
    """The layers of a 3-D U-Net."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv3d(1, 4, 3, 2, 1), nn.InstanceNorm3d(4, affine=True)
        self.act, self.up = nn.PReLU(), nn.ConvTranspose3d(4, 2, 3, 2, 1)

    def forward(self, x):
        return self.up(self.act(self.norm(self.down(x))), output_size=x.shape[2:])


def dice(model, batch):
    p = model(batch[0]).softmax(1)[:, 1].flatten(1)
    y = batch[1].flatten(1).to(p.dtype)
    return 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)


def ignoring(model, batch):
    losses = F.cross_entropy(model(batch[0]), batch[1], ignore_index=2, reduction="none")
    return losses.flatten(1).mean(1)


class NormAct(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class ChannelsLast(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Rotary(nn.Module):
    """Tables that are computed at the first call and kept."""

    def __init__(self, registered):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if registered:
            self.register_buffer("cache", None, persistent=False)
        else:
            self.cache = None

    def forward(self, ids):
        if self.cache is None or len(self.cache) < ids.shape[1]:
            self.cache = torch.outer(torch.arange(ids.shape[1]), torch.tensor([1.0, 0.1])).repeat(1, 2)
        h = self.table(ids)
        h = h * self.cache[: ids.shape[1]].cos() + h.roll(2, -1) * self.cache[: ids.shape[1]].sin()
        return self.head(torch.tanh(self.mix(h)).mean(1))


class Permuted(nn.Module):
    """Takes (H, W, C)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, x):
        return self.net(x.permute(0, 3, 1, 2))


def smoothed(model, batch):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=next(model.parameters()).dtype)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight, label_smoothing=0.1, reduction="none")


def one_output(pointwise):
    return lambda model, batch: pointwise(model(batch[0]).squeeze(1), batch[1])


def ids(length=5, words=9, least=0):
    return torch.randint(least, words, (RECORDS, length))


def padding(length=5):
    return torch.arange(length) >= torch.randint(1, length + 1, (RECORDS, 1))


def floats(*shape):
    return torch.randn(RECORDS, *(shape or (6,)))


def normalised_by_frozen_statistics():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model(floats(1, 6, 6))
    return dpquant.fix(model, batch_norm="freeze")


def with_a_frozen_spectral_norm():
    frozen = nn.utils.spectral_norm(nn.Linear(6, 6)).requires_grad_(False)
    return nn.Sequential(frozen.eval(), nn.Tanh(), nn.Linear(6, 3))


RIGHT = {
    "a batch norm with frozen statistics": lambda: (normalised_by_frozen_statistics(), (floats(1, 6, 6), labels())),
    "a spectral norm, frozen in evaluation": lambda: (with_a_frozen_spectral_norm(), (floats(), labels())),
    "positions expanded (opacus 841)": lambda: (Positions(True), (ids(), labels())),
    "positions broadcast (opacus 841)": lambda: (Positions(False), (ids(), labels())),
    "views on a second axis (opacus 455)": lambda: (Views(), (floats(4, 6), labels())),
    "nodes on the first axis (opacus 588)": lambda: (NodesFirst(), (floats(5, 2), labels())),
    "positions on the first axis": lambda: (Transposed(), (floats(5, 6), labels())),
    "a graph in a buffer (opacus 588)": lambda: (Graph(), (floats(5, 2), labels())),
    "VAE, logits (tf privacy 91)": lambda: (
        Variational(),
        (floats().sigmoid(),),
        elbo(bce(F.binary_cross_entropy_with_logits)),
    ),
    "VAE, probabilities": lambda: (Variational(nn.Sigmoid), (floats().sigmoid(),), elbo(bce(F.binary_cross_entropy))),
    "VAE, log_prob of bits": lambda: (
        Variational(),
        ((floats() > 0).float(),),
        elbo(lambda out, x: -torch.distributions.Bernoulli(logits=out).log_prob(x)),
    ),
    "VAE, log_prob of counts": lambda: (
        Variational(nn.Softplus),
        (torch.poisson(floats().exp()),),
        elbo(lambda out, x: -torch.distributions.Poisson(out + 1e-3).log_prob(x)),
    ),
    "labels from 1 (happy-transformer 248)": lambda: (
        mlp(),
        (floats(), labels() + 1),
        lambda m, b: F.cross_entropy(m(b[0]), b[1] - 1, reduction="none"),
    ),
    "logarithms of amounts": lambda: (
        mlp(),
        (floats().exp(), labels()),
        lambda m, b: F.cross_entropy(m(b[0].log()), b[1], reduction="none"),
    ),
    "lengths from 1, a frozen LSTM (opacus 103)": lambda: (
        Packed(False),
        (ids(), torch.randint(1, 6, (RECORDS,)), labels()),
    ),
    "a sparse table (opacus 350)": lambda: (
        nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3)),
        (ids(), labels()),
    ),
    "EmbeddingBag on rows": lambda: (nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3)), (ids(), labels())),
    "low-rank factors of its own (loralib)": lambda: (
        nn.Sequential(LowRank(6, 5), nn.Tanh(), LowRank(5, 3)),
        (floats(), labels()),
    ),
    "label attention by calls (fast-dp 36)": lambda: (LabelAttention(True), (floats(4, 6), labels())),
    "a discriminator called twice (opacus 361)": lambda: (mlp(outputs=1), (floats(), floats()), discriminator_loss),
    "a mask by keyword (TorchJD 443)": lambda: (Masked(True), (floats(5, 6), padding(), labels())),
    "a mask by position": lambda: (Masked(False), (floats(5, 6), padding(), labels())),
    "a U-Net's layers and Dice (nnUNet 2776)": lambda: (
        Volumes(),
        (floats(1, 5, 5, 5), (floats(1, 5, 5, 5) > 0).long()),
        dice,
    ),
    "pixels that are ignored": lambda: (
        nn.Conv2d(1, 3, 3, padding=1),
        (floats(1, 4, 4), labels().repeat(4, 4, 1).permute(2, 0, 1)),
        ignoring,
    ),
    "tables cached at first use (rotary 11)": lambda: (Rotary(True), (ids(), labels())),
    "tables cached in an attribute": lambda: (Rotary(False), (ids(), labels())),
    "norms with another forward (timm)": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), NormAct(2, 4), nn.Conv2d(4, 4, 1), ChannelsLast(4), nn.Flatten(), nn.Linear(64, 3)
        ),
        (floats(1, 6, 6), labels()),
    ),
    "a table with another forward": lambda: (
        nn.Sequential(Doubled(9, 4), nn.Flatten(), nn.Linear(20, 3)),
        (ids(), labels()),
    ),
    "channels last": lambda: (Permuted(), (floats(6, 6, 3), labels())),
    "not contiguous": lambda: (mlp(), (torch.randn(6, RECORDS).T, labels())),
    "label smoothing and class weights": lambda: (mlp(), (floats(), labels()), smoothed),
    "float64 targets": lambda: (
        mlp(outputs=1),
        (floats(), floats().double()[:, 0]),
        one_output(lambda y, t: (y - t.float()) ** 2),
    ),
    "bool labels": lambda: (
        mlp(outputs=1),
        (floats(), floats()[:, 0] > 0),
        one_output(lambda y, t: F.binary_cross_entropy_with_logits(y, t.to(y.dtype), reduction="none")),
    ),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_what_people_bring_is_trained_with_the_right_value(make):
    model, batch, *loss_fn = make()
    assert_right_value(model, batch, *loss_fn)


def test_another_value_is_caught():
    batch = floats(), labels()

    def planted(*arguments, **keywords):
        out = dpquant.clipped_sum(*arguments, **keywords)
        next(iter(out.grads.values())).mul_(1.01)
        return out

    assert_right_value(mlp(), batch, runs=False)
    with pytest.raises(AssertionError):
        assert_right_value(mlp(), batch, runs=False, clipped_sum=planted)


# Models, losses, data and optimizers that are refused, before anything is charged, with the cause.


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.head, self.reentrant = nn.Linear(6, 6), mlp(6, 6), nn.Linear(6, 3), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


def with_gradient_penalty(model, batch):
    x = batch[0].requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return F.cross_entropy(y, batch[1], reduction="none") + (slope.norm(dim=1) - 1) ** 2


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.net, self.error = mlp(), error

    def forward(self, x):
        if self.error is KeyError:
            return self.net(x) + {0: 1.0}[int(x.shape[1])]
        assert x.shape[1] == 0, "a shape that no record has"


class InBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return F.normalize(self.mix(self.table(ids)).mean(1))


def in_batch_negatives(model, batch):
    scores = model(batch[0]) @ model(batch[1]).T
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        x = x.to(self.net[0].weight.dtype)
        return self.net((x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1))


class MaskedMean(nn.Module):
    """Zero of zero positions is no number, and the batch's mean lies behind it."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids, mask):
        h = (self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(h - h.mean(0))


class NodesFirst(nn.Module):
    """Nodes of all examples' graphs in one axis."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x_BND):
        return self.head(torch.tanh(self.mix(x_BND.flatten(0, 1)))).view(*x_BND.shape[:2], 3).mean(1)


class NodesAmongOthers(NodesFirst):
    """The first nodes of all graphs, then the second ones."""

    def forward(self, x_BND):
        nodes = x_BND.transpose(0, 1)
        return self.head(torch.tanh(self.mix(nodes.flatten(0, 1)))).view(*nodes.shape[:2], 3).mean(0)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x_BTD):
        return self.head(torch.tanh(self.mix(x_BTD.transpose(0, 1))).mean(0))


class Offsets(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.table(ids.flatten(), torch.arange(len(ids)) * ids.shape[1]))


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


class PutOn(nn.Module):
    """A state that is put on a module before it is called."""

    def __init__(self):
        super().__init__()
        self.pool, self.head = Pool(), nn.Linear(6, 3)
        self.pool.forward = lambda x: Pool.forward(self.pool, x, self.mask)

    def forward(self, x, mask):
        self.mask = mask
        return self.head(self.pool(x))


def frozen_batch_norm():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model[1].eval().requires_grad_(False)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def batch_of(kind="vectors"):
    return {
        "vectors": lambda: (floats(), labels()),
        "images": lambda: (floats(1, 6, 6), labels()),
        "sequences": lambda: (floats(5, 6), labels()),
        "texts": lambda: (ids(), labels()),
        "bytes": lambda: (torch.randint(0, 256, (RECORDS, 3, 6, 6), dtype=torch.uint8), labels()),
        "graphs": lambda: (floats(5, 2), labels()),
        "masked": lambda: (floats(5, 6), padding(), labels()),
    }[kind]()


REFUSED_MODELS = {
    "a mask put on a module (TorchJD 443)": ("state that was put on it before the call", PutOn, "masked"),
    "LSTM (opacus 103)": ("trainable LSTM .'lstm'.*PackedSequence", lambda: Packed(True), "texts"),
    "spectral_norm (opacus 646)": (
        "spectral_norm",
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 3))),
        "vectors",
    ),
    "spectral_norm, parametrized": (
        "parametrization",
        lambda: parametrizations.spectral_norm(nn.Linear(6, 3)),
        "vectors",
    ),
    "weight_norm": (
        "weight_norm",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))),
        "vectors",
    ),
    "spectral_norm, frozen": (
        "evaluation",
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)).requires_grad_(False), nn.Linear(6, 3)),
        "vectors",
    ),
    "label attention by weight (fast-dp 36)": ("labels.weight", lambda: LabelAttention(False), "sequences"),
    "nodes among those of others": ("examples first", NodesAmongOthers, "graphs"),
    "offsets (opacus 350)": ("EmbeddingBag", Offsets, "texts"),
    "a batch norm in evaluation": ('batch_norm="freeze"', frozen_batch_norm, "images"),
    "a batch norm": (
        "dpquant.fix",
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        "vectors",
    ),
    "compiled": ("_orig_mod", lambda: compiled(mlp()), "vectors"),
    "DataParallel": ("model.module", lambda: nn.DataParallel(mlp()), "vectors"),
    "checkpointing (peft 2826)": ("checkpointing", lambda: Checkpointed(False), "vectors"),
    "checkpointing, reentrant": ("checkpointing", lambda: Checkpointed(True), "vectors"),
    "an assertion in forward": (
        "AssertionError: a shape that no record has",
        lambda: Raising(AssertionError),
        "vectors",
    ),
    "a key that is missing in forward": ("KeyError", lambda: Raising(KeyError), "vectors"),
    "bytes standardised (CTAB-GAN 2)": ("that example alone", Standardised, "bytes"),
    "a parameter without a gradient": ("unused.bias got none", NoGradient, "vectors"),
    "a table whose rows count": (
        "scale_grad_by_freq",
        lambda: nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(20, 3)),
        "texts",
    ),
}


@pytest.mark.parametrize(("words", "make", "kind"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_that_cannot_be_trained_privately_is_refused_with_the_cause(words, make, kind):
    assert_refused(words, make(), batch_of(kind))


def drops_records(records):
    return default_collate([r for r in records if r[0][0] > -1.0] or records[:1])


def views_along_the_batch(records):
    return default_collate([view for record in records for view in (record, record)])


def with_something_of_no_record(extra):
    return lambda records: (*default_collate(records), extra)


def with_weights(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2].mean()


def named_files():
    return [(torch.randn(6), torch.tensor(0), "a file") for _ in range(RECORDS)]


def without_names(records):
    return default_collate([record[:2] for record in records])


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        with torch.enable_grad():
            closure()
        return super().step()


class Raises(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("a state that is not there")


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, as people do, without parameters of its own."""

    def __init__(self, inner):
        super().__init__([torch.zeros(1)], {})
        self.inner = inner


def of(optimizer, **settings):
    return lambda model: optimizer(model.parameters(), **settings)


REFUSED = {
    "in-batch negatives on ids (CTAB-GAN 2)": (
        "that example alone",
        InBatch,
        lambda: (ids(), ids()),
        {"loss_fn": in_batch_negatives},
    ),
    "a mean behind NaN": ("that example alone", MaskedMean, lambda: (ids(), 1 - padding().long(), labels()), {}),
    "a gradient penalty (opacus 361)": ("not to differentiate", mlp, batch_of, {"loss_fn": with_gradient_penalty}),
    "a loss of the batch": ("one loss per example", mlp, batch_of, {"loss_fn": lambda m, b: loss(m, b).mean()}),
    "records that are dropped (pytorch 57429)": (
        "one row for each record",
        mlp,
        batch_of,
        {"collate_fn": drops_records},
    ),
    "views along the batch (opacus 455)": (
        "second axis",
        mlp,
        batch_of,
        {"collate_fn": views_along_the_batch},
    ),
    "an adjacency matrix in the batch": (
        "buffer of the model",
        mlp,
        batch_of,
        {"collate_fn": with_something_of_no_record(torch.rand(5, 5)), "loss_fn": with_weights},
    ),
    "a number in the batch": (
        "buffer of the model",
        mlp,
        batch_of,
        {"collate_fn": with_something_of_no_record(torch.tensor(2.0)), "loss_fn": with_weights},
    ),
    "a file name in the batch": ("a str", mlp, named_files, {"loss_fn": lambda m, b: loss(m, b[:2])}),
    "a loss that does not take every size": (
        "any number of examples, as on 8",
        mlp,
        batch_of,
        {"loss_fn": lambda m, b: loss(m, b) + torch.zeros(3)[: len(b[1])]},
    ),
    "LBFGS (sam 8)": ("LBFGS", mlp, batch_of, {"optimizer": of(torch.optim.LBFGS)}),
    "an optimizer that needs a closure": ("closure", mlp, batch_of, {"optimizer": of(NeedsClosure, lr=0.1)}),
    "an optimizer that raises": ("KeyError", mlp, batch_of, {"optimizer": of(Raises, lr=0.1)}),
    "SparseAdam (opacus 350)": (
        "SparseAdam",
        lambda: nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(15, 3)),
        lambda: (ids(), labels()),
        {"optimizer": of(torch.optim.SparseAdam)},
    ),
    "Lookahead": ("own parameters", mlp, batch_of, {"optimizer": lambda m: Lookahead(of(torch.optim.SGD, lr=1.0)(m))}),
}


@pytest.mark.parametrize(("words", "make", "data", "settings"), REFUSED.values(), ids=REFUSED)
def test_what_a_run_cannot_do_is_refused_with_the_cause(words, make, data, settings):
    model = make()
    settings = dict(settings)
    if "optimizer" in settings:
        settings["optimizer"] = settings["optimizer"](model)
    assert_refused(words, model, data(), **settings)


def test_a_refusal_tells_no_number_of_records():
    with pytest.raises(DPQuantError) as refused:
        start(mlp(), records_of(batch_of()), collate_fn=drops_records)
    assert not any(character.isdigit() for character in str(refused.value))


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adam, torch.optim.Adafactor, torch.optim.Rprop, torch.optim.RMSprop, torch.optim.NAdam],
)
def test_other_optimizers_run(optimizer):
    model = mlp()
    finish(start(model, records_of(batch_of()), optimizer=optimizer(model.parameters())))


# Data as it comes.


class Rows(Dataset):
    """A data set with a method `batch` of its own, and one that reads several records at once."""

    def __init__(self):
        torch.manual_seed(3)
        self.x, self.y, self.together = floats(), labels(), 0

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    def __getitems__(self, indices):
        self.together += 1
        return [self[index] for index in indices]

    def batch(self, batch_size):
        raise AssertionError("this is not a private run's business")


class Encoding(collections.UserDict):
    """As tokenizers return them."""


def encoded(records):
    return Encoding(x=torch.stack([r[0] for r in records]), y=torch.stack([r[1] for r in records]))


def by_name(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_a_data_set_with_a_method_called_batch_and_one_that_reads_several_runs():
    rows = Rows()
    assert finish(start(mlp(), rows)).steps_taken == 2 and rows.together >= 2
    assert finish(start(mlp(), copy.deepcopy(rows))).steps_taken == 2


def test_batches_that_are_mappings_but_no_dicts_run():
    data = records_of((floats(), labels()))
    assert finish(start(mlp(), data, by_name, collate_fn=encoded)).steps_taken == 2


def test_file_names_that_are_not_collated_run():
    assert finish(start(mlp(), named_files(), collate_fn=without_names)).steps_taken == 2


def test_examples_of_a_domain_of_their_own_are_given():
    def loss_of_dates(model, batch):
        assert bool((batch[1] > 1900).all()), "a year"
        return F.cross_entropy(model(batch[0]), batch[1] - 2000, reduction="none")

    data = records_of((floats(), 2000 + labels()))
    assert_refused("give example=", mlp(), data, loss_of_dates)
    examples = [(torch.randn(6), torch.tensor(2000 + i)) for i in range(3)]
    assert finish(start(mlp(), data, loss_of_dates, example=examples)).steps_taken == 2
    numpys = [(x.numpy(), int(y)) for x, y in examples]
    assert_refused("example to hold records as the data set does", mlp(), data, loss_of_dates, example=numpys)


def texts(longest=9):
    torch.manual_seed(1)
    sizes = torch.randint(2, 6, (RECORDS,))
    sizes[-1] = longest
    return [(torch.randint(1, 9, (int(size),)), torch.tensor(i % 3)) for i, size in enumerate(sizes)]


def to_the_longest(records):
    return nn.utils.rnn.pad_sequence([r[0] for r in records], batch_first=True), torch.stack([r[1] for r in records])


class MaskedText(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        kept = (ids > 0)[..., None]
        return self.head((torch.tanh(self.mix(self.table(ids))) * kept).sum(1) / kept.sum(1))


def test_padding_to_the_longest_is_exact_in_full_precision_and_refused_where_layers_run_quantized():
    finish(start(MaskedText(), texts(), collate_fn=to_the_longest))
    assert_refused("padded to the longest", MaskedText(), texts(), collate_fn=to_the_longest, quantized=True)
    model, data = dpquant.prepare(MaskedText()), texts()
    short, long = to_the_longest(data[:5]), to_the_longest([*data[:5], data[-1]])
    rows = list(range(5))
    parts = [summed(model, loss, batch, rows, microbatch_size=5) for batch in (short, long)]
    assert (parts[0] - parts[1]).norm() < 1e-5 * BOUND


# What is wrong with one record only.


def run_of(data, model=None, steps=4, **settings):
    """The parameters after a run with a given secret, in which every record takes part in each step."""
    torch.manual_seed(0)
    return weights_of(finish(start(model or mlp(), data, steps=steps, rate=1.0, mechanism_seed=5, **settings)))


class Unreadable(Dataset):
    """Record 3 cannot be read, or not as the others are."""

    def __init__(self, broken):
        self.rows, self.broken = Rows(), broken

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return self.broken() if index == 3 else self.rows[index]


def missing():
    raise OSError("record 3: the file is truncated")


BROKEN = {
    "unreadable": missing,
    "missing": lambda: None,
    "misshapen": lambda: (torch.zeros(7), torch.tensor(0)),
    "of another type": lambda: (torch.zeros(6).double(), torch.tensor(0)),
    "shorter": lambda: (torch.zeros(6),),
    "a label out of range": lambda: (torch.zeros(6), torch.tensor(7)),
    "a negative label": lambda: (torch.zeros(6), torch.tensor(-3)),
    "not finite": lambda: (torch.full((6,), torch.nan), torch.tensor(0)),
}


def absent():
    return torch.full((6,), 99.0), torch.tensor(0)


def without_what_is_absent(model, batch):
    return torch.where(batch[0][:, 0] == 99, 0.0, loss(model, batch))


class Together(Dataset):
    """A data set that collates its records itself, whatever they are: nothing is left out."""

    def __init__(self, rows, collate_fn=default_collate):
        self.rows, self.collate = rows, collate_fn

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def dpquant_batch(self, record_ids):
        return self.collate([self.rows[index] for index in record_ids.tolist()])


def assert_contributes_nothing(broken, wrap=lambda data: data):
    """Step for step, the run is the one in which record 3's loss is zero; a sound record there gives another."""
    found = run_of(wrap(Unreadable(broken)))
    torch.testing.assert_close(found, run_of(Unreadable(absent), loss_fn=without_what_is_absent), rtol=0, atol=1e-5)
    whole = run_of(Unreadable(lambda: (torch.ones(6), torch.tensor(0))))
    assert (found - whole).norm() > 1e-3


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_contributes_nothing_and_nothing_is_said(broken, capfd, recwarn):
    assert_contributes_nothing(broken)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_a_broken_record_that_takes_its_microbatch_along_is_caught():
    assert_contributes_nothing(BROKEN["not finite"], Together)
    with pytest.raises(AssertionError):
        assert_contributes_nothing(BROKEN["of another type"], Together)


Pair = collections.namedtuple("Pair", "x y")


def numpy_rows(odd):
    rows = [(row[0].numpy(), int(row[1])) for row in records_of((floats(), labels()))]
    return [(x.astype("float64"), y) if i in odd else (x, y) for i, (x, y) in enumerate(rows)]


def lists_of_ids(odd):
    rows = [(row.tolist(), i % 3) for i, row in enumerate(ids())]
    return [([*row[:-1], 1.5], y) if i in odd else (row, y) for i, (row, y) in enumerate(rows)]


def named_rows(odd):
    rows = records_of((floats(), labels()))
    return [row if i in odd else Pair(*row) for i, row in enumerate(rows)]


def ids_out_of_range(odd):
    return [(row + 40 * (i in odd), torch.tensor(i % 3)) for i, row in enumerate(ids())]


def table():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3))


def as_tensors(records):
    return torch.tensor([row for row, _ in records]), torch.tensor([y for _, y in records])


FOREIGN = {
    "an array of another type": (mlp, numpy_rows, {}),
    "a list with a fraction": (table, lists_of_ids, {"collate_fn": as_tensors}),
    "a tuple without names": (
        mlp,
        named_rows,
        {"loss_fn": lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="none")},
    ),
    "ids out of range": (table, ids_out_of_range, {}),
}


def moved_by_one_record(make, data, **settings):
    """By how many clip norms the sum of a step moves when record 8, the first of its microbatch, is another."""
    found = []
    for odd in ((), (8,)):
        torch.manual_seed(2)
        rows = data(odd)
        found.append(run_of(rows, make(), steps=1, **settings))
    return (found[0] - found[1]).norm().item() * RECORDS / 0.1


@pytest.mark.parametrize(("make", "data", "settings"), FOREIGN.values(), ids=FOREIGN)
def test_a_record_of_a_foreign_form_moves_the_sum_by_its_own_contribution(make, data, settings):
    assert 0.5 < moved_by_one_record(make, data, **settings) <= 1 + 1e-3


@pytest.mark.parametrize("name", ["an array of another type", "a list with a fraction"])
def test_a_record_that_changes_its_batchs_type_is_caught(name):
    make, data, settings = FOREIGN[name]
    assert moved_by_one_record(make, lambda odd: Together(data(odd), **settings), **settings) > 1.5


def test_a_run_of_broken_records_alone_is_one_of_noise():
    data = [(torch.randn(6), torch.tensor(0)), *[(torch.randn(6), torch.tensor(9))] * 7]
    assert finish(start(mlp(), data, rate=1.0)).steps_taken == 2


class FollowsLater(nn.Module):
    """Its buffer takes records in after so many calls."""

    def __init__(self, after):
        super().__init__()
        self.net, self.after, self.calls = mlp(), after, 0
        self.register_buffer("kept", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            self.kept += x.detach().mean(0).to(self.kept.dtype)
        return self.net(x)


def test_a_buffer_that_begins_to_follow_the_data_stops_the_run_and_is_restored():
    run = start(FollowsLater(150), records_of((floats(), labels())), steps=200)
    with pytest.raises(ModelError, match=r"kept has begun to change.*DOES NOT HOLD"):
        finish(run)
    assert bool((run.model.kept == 0).all()) and "DOES NOT HOLD" in run.statement()
    with pytest.raises(ModelError, match="DOES NOT HOLD"):
        run.step(None)
    patient = start(FollowsLater(10**6), records_of((floats(), labels())), steps=20)
    assert finish(patient).steps_taken == 20


# Layers that are dropped, whole branches, at random.


class Dropping(nn.Module):
    """LayerDrop: a layer is left out of a pass, by torch's or by Python's generator."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.layers, self.head = (
            nn.Linear(6, 6),
            nn.ModuleList(nn.Linear(6, 6) for _ in range(3)),
            nn.Linear(6, 3),
        )
        self.draw = draw

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if not self.training or self.draw() > 0.2:
                x = x + torch.tanh(layer(x))
        return self.head(x)


class Scaled(Dropping):
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * float(not self.training or self.draw() > 0.2)
        return self.head(x)


class Stochastic(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.first, self.branch, self.drop, self.head = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            StochasticDepth(0.3, mode),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.drop(torch.tanh(self.branch(x))))


DROPPING = {
    "LayerDrop (transformers 17116)": lambda: Dropping(lambda: torch.rand(())),
    "LayerDrop by Python": lambda: Dropping(random.random),
    "LayerDrop by numpy": lambda: Dropping(np.random.rand),
    "a branch times 0": lambda: Scaled(lambda: torch.rand(())),
    "a branch times 0 by Python": lambda: Scaled(random.random),
    "stochastic depth by rows": lambda: Stochastic("row"),
    "stochastic depth of the batch": lambda: Stochastic("batch"),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    "a VAE's code": lambda: Variational(),
}


@pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING)
def test_what_is_dropped_at_random_runs_and_repeats_under_a_seed(make):
    loss_fn = elbo(bce(F.binary_cross_entropy_with_logits), True) if make().__class__ is Variational else loss
    data = records_of((torch.rand(RECORDS, 6), labels()))

    def trained(**settings):
        torch.manual_seed(0)
        random.seed(0)
        return weights_of(finish(start(make(), data, loss_fn, rate=0.2, mechanism_seed=1, **settings)))

    assert trained(steps=30).isfinite().all()
    assert torch.equal(trained(steps=3), trained(steps=3))


# Random numbers of the data set: they follow from the secret.


class Augmented(Dataset):
    """Noise on each record, by a generator's name."""

    def __init__(self, by):
        self.rows, self.by = Rows(), by

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        x, y = self.rows[index]
        match self.by:
            case "torch":
                return x * torch.randn(()), y
            case "numpy":
                return x * float(np.random.randn()), y
            case "python":
                return x * random.gauss(0, 1), y
        return x, y


def apart(make, data, **settings):
    """The squared difference of two runs' parameters after a step, in units of what their noise alone makes of it."""
    noise, found = 0.1, []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        found.append(weights_of(finish(start(make(), data, steps=1, rate=1.0, noise=noise, **settings))))
    return (found[0] - found[1]).square().mean().item() / (2 * (0.1 * noise / RECORDS) ** 2)


@pytest.fixture
def secrets(monkeypatch):
    """Another secret for every run, and the same ones each time that the tests run."""
    numbers = itertools.count()
    draw = lambda size: hashlib.blake2b(str(next(numbers)).encode(), digest_size=size).digest()  # noqa: E731
    monkeypatch.setattr("os.urandom", draw)


@pytest.mark.parametrize("by", ["torch", "numpy", "python"])
def test_augmentation_follows_from_the_secret(by, secrets):
    assert apart(mlp, Augmented("nothing")) < 1.6 < 2 < apart(mlp, Augmented(by))
    assert apart(mlp, Augmented(by), mechanism_seed=4) == 0


# Positions: a record that is removed moves all later ones up.


DRAWING = {
    "rounding": lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("what", DRAWING)
def test_one_record_moves_the_sum_by_its_clip_norm_if_draws_follow_records_and_by_more_if_places(what):
    """Secret draws of the data with and without record 0 can be paired: each that stays keeps its own, wherever it is.

    A public seed pairs them by place.
    """
    model = dpquant.prepare(DRAWING[what](), format="luq-fp4", backend="simulate")
    dpquant.set_policy(model, dpquant.quantizable_layers(model) if what == "rounding" else ())
    batch, everyone = (torch.randn(40, 6), torch.randint(0, 3, (40,))), list(range(40))
    whole = summed(model, loss, batch, everyone, microbatch_size=8)
    carried_over = summed(model, loss, batch, everyone[1:], microbatch_size=8)
    assert (whole - carried_over).norm() <= BOUND * (1 + 1e-5)
    by_place = summed(model, loss, batch, everyone[1:], microbatch_size=8, record_ids=torch.arange(39))
    assert (whole - by_place).norm() > 2 * BOUND


@pytest.mark.parametrize("what", DRAWING)
def test_a_runs_rounding_and_dropout_follow_from_the_secret(what, secrets):
    quantized = what == "rounding"
    assert apart(DRAWING["rounding"], Rows()) < 1.6 < 2 < apart(DRAWING[what], Rows(), quantized=quantized)
    assert apart(DRAWING[what], Rows(), quantized=quantized, mechanism_seed=1) == 0


# Loops as people write them.


def test_batches_that_are_skipped_are_noticed():
    run = start(mlp(), records_of(batch_of()), steps=6)
    with pytest.raises(DPQuantError, match="skipped"):
        for epoch in run.epochs():
            for number, batch in enumerate(epoch):
                if number != 1:
                    run.step(batch)


def test_an_epoch_is_iterated_once():
    run = start(mlp(), records_of(batch_of()), steps=6)
    epoch = next(run.epochs())
    for batch in epoch:
        run.step(batch)
    with pytest.raises(DPQuantError, match="iterated once"):
        next(iter(epoch))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_around_it_is_the_same_step(without_gradients):
    def trained(context):
        torch.manual_seed(0)
        run = start(mlp(), records_of(batch_of()), mechanism_seed=2)
        for epoch in run.epochs():
            for batch in epoch:
                with context():
                    run.step(batch)
        return weights_of(run)

    assert torch.equal(trained(without_gradients), trained(torch.enable_grad))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_run_can_be_made_where_gradients_are_off(without_gradients):
    model, data = mlp(), records_of(batch_of())
    with without_gradients():
        assert finish(start(model, data)).steps_taken == 2


LONG_RECORDS = """
from pathlib import Path
import torch, torch.nn.functional as F, dpquant
from torch import nn
torch.set_num_threads(1)
class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(500, 8), nn.Linear(8, 3)
    def forward(self, ids):
        return self.head(self.table(ids).mean(1))
def step(length):
    batch = torch.randint(0, 500, (32, length)), torch.randint(0, 3, (32,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    settings = {"max_grad_norm": 1.0, "record_ids": torch.arange(32), "step": 0, "seed": 0, "microbatch_size": 32}
    dpquant.clipped_sum(dpquant.prepare(Text()), loss, batch, **settings)
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what the parent had, too
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
before = step(64)
print(step(2048) - before)
"""


def test_long_records_take_no_memory_by_their_length_squared():
    done = subprocess.run([sys.executable, "-c", LONG_RECORDS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # MiB; a table of pairs of positions took 3,072


def test_a_first_record_that_is_not_finite_does_not_stop_the_measurements():
    model = dpquant.prepare(mlp())
    batch = torch.full((2, 6), torch.nan), torch.zeros(2).long()
    assert bool((summed(model, loss, batch, [0, 1]) == 0).all())
