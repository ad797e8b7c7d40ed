# SPDX-License-Identifier: Apache-2.0
"""Attention, recurrent layers, convolutions over other axes, transposed and tied weights: values and per-example sums.

In full precision the clipped sum is that of a loop of plain autograd over single examples. Quantized, no example
contributes more than C, and the batch is the sum of its examples.
"""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.checks.refusals import check_trainable
from dpquant.engine.attention import QuantMultiheadAttention
from dpquant.engine.convert import restore
from dpquant.engine.layers import count_macs, prepare, quantizable_layers, set_policy
from dpquant.engine.quantizable import QuantTransposedLinear
from dpquant.engine.recurrent import QuantGRU
from dpquant.engine.summed import Summed, cross_products
from dpquant.engine.weight_layout import WeightLayout
from dpquant.errors import ModelError

COUNT, CLIP = 4, 0.3
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Conv1D(nn.Module):
    """A linear layer with a weight `(inputs, outputs)`, called and stored as GPT-2's."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture
def conv1d(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))


class Attend(nn.Module):
    """Attention between inputs of the user's choice; the sum over features of its outputs is the output."""

    def __init__(self, call, **settings):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings}), call
        for p in self.attention.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x, memory, lengths):
        return self.call(self.attention, x, memory, lengths)


def first(function):
    def call(attention, x, memory, lengths):
        return function(attention, x, memory)[0].flatten(1)

    return call


def with_weights(attention, x, memory, lengths):
    y, weights = attention(x, x, x, average_attn_weights=False)
    return torch.cat([y.flatten(1), weights.flatten(1)], 1)


def padded(attention, x, memory, lengths):
    mask = torch.arange(x.shape[1]) >= lengths[:, None]
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y = attention(x, x, x, key_padding_mask=mask, attn_mask=causal, need_weights=False, is_causal=True)[0]
    return y.flatten(1)


def masked_by_head(attention, x, memory, lengths):
    mask = (torch.arange(x.shape[1]) >= lengths[:, None])[:, None].expand(-1, x.shape[1], -1)
    return attention(x, x, x, attn_mask=mask.repeat_interleave(2, 0))[0].flatten(1)


def positions_first(attention, x, memory, lengths):
    x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    y, weights = attention(x, memory, memory)
    return torch.cat([y.transpose(0, 1).flatten(1), weights.flatten(1)], 1)


ATTENTION = {
    "self": lambda: Attend(first(lambda a, x, m: a(x, x, x))),
    "self, without weights": lambda: Attend(first(lambda a, x, m: a(x, x, x, need_weights=False))),
    "self, without bias": lambda: Attend(first(lambda a, x, m: a(x, x, x)), bias=False),
    "weights of heads": lambda: Attend(with_weights),
    "memory": lambda: Attend(first(lambda a, x, m: a(x, m, m))),
    "queries and keys alike": lambda: Attend(first(lambda a, x, m: a(x, x, x + 1))),
    "all different": lambda: Attend(first(lambda a, x, m: a(x, m, 2 * m))),
    "twice": lambda: Attend(first(lambda a, x, m: (a(x, m, m)[0] + a(x, x, x)[0],))),
    "other sizes": lambda: Attend(first(lambda a, x, m: a(x, m[..., :5], m[..., :3])), kdim=5, vdim=3),
    "padding, causal": lambda: Attend(padded),
    "a mask for every head": lambda: Attend(masked_by_head),
    "positions first": lambda: Attend(positions_first, batch_first=False),
}


def attended():
    return torch.randn(COUNT, 5, 8), torch.randn(COUNT, 3, 8), torch.tensor([5, 2, 1, 3])


class Recurrent(nn.Module):
    def __init__(self, kind, *, all_states=True, **settings):
        super().__init__()
        self.layer, self.all_states = kind(3, 4, **settings), all_states

    def forward(self, x):
        batch_first = self.layer.batch_first
        y, last = self.layer(x if batch_first else x.transpose(0, 1))
        last = last if isinstance(last, tuple) else (last,)
        y = y if batch_first else y.transpose(0, 1)
        states = torch.cat([state.transpose(0, 1).flatten(1) for state in last], 1)
        return torch.cat([y.flatten(1), states], 1) if self.all_states else states


RECURRENT = {
    "RNN": lambda: Recurrent(nn.RNN, batch_first=True),
    "RNN, relu": lambda: Recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM": lambda: Recurrent(nn.LSTM, batch_first=True),
    "LSTM, two layers, both directions": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: Recurrent(nn.LSTM, proj_size=2, num_layers=2, batch_first=True),
    "LSTM, last states": lambda: Recurrent(nn.LSTM, all_states=False, batch_first=True, bias=False),
    "GRU": lambda: Recurrent(nn.GRU, batch_first=True),
    "GRU, two layers, both directions": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
}

CONVOLUTIONS = {
    "1-D": lambda: (nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "1-D, strided": lambda: (nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2), (9,)),
    "1-D, reflect": lambda: (nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), (9,)),
    "3-D": lambda: (nn.Conv3d(4, 6, 3, padding=1), (4, 5, 6)),
    "3-D, strided": lambda: (nn.Conv3d(4, 6, (2, 3, 1), stride=(2, 3, 2), padding=(1, 2, 0)), (4, 5, 6)),
    "3-D, dilated": lambda: (nn.Conv3d(4, 6, 2, dilation=(2, 1, 3), groups=2), (4, 5, 6)),
    "3-D, same": lambda: (nn.Conv3d(4, 2, (3, 1, 3), padding="same"), (4, 5, 6)),
    "3-D, circular": lambda: (nn.Conv3d(4, 2, 3, padding=(1, 0, 1), padding_mode="circular", bias=False), (4, 5, 6)),
}


class Language(nn.Module):
    """A table that is input embedding and output layer at once."""

    def __init__(self, padding_idx=0, norm=nn.RMSNorm):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.norm, self.mix, self.head = norm(6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.norm(self.table(ids))))).flatten(1)


def stack(attention_dropout=0.0):
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=attention_dropout, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten())


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True).flatten(1)


def models():
    """{name: (model, its inputs)}."""
    found = {f"attention: {name}": (make, attended) for name, make in ATTENTION.items()}
    found |= {f"recurrent: {name}": (make, lambda: (torch.randn(COUNT, 5, 3),)) for name, make in RECURRENT.items()}
    for name, make in CONVOLUTIONS.items():
        size = make()[1]
        found[f"convolution: {name}"] = (
            lambda make=make: nn.Sequential(make()[0], nn.Flatten()),
            lambda size=size: (torch.randn(COUNT, 4, *size),),
        )

    def ids():
        return (torch.randint(0, 11, (COUNT, 5)),)

    found |= {
        "tied": (Language, ids),
        "tied, no padding": (lambda: Language(None, nn.LayerNorm), ids),
        "tied, one position": (Language, lambda: (torch.randint(1, 11, (COUNT, 1)),)),
        "encoder": (stack, lambda: (torch.randn(COUNT, 5, 8),)),
        "decoder": (Decoder, lambda: attended()[:2]),
        "Conv1D": (lambda: nn.Sequential(Conv1D(6, 3), nn.Tanh(), Conv1D(2, 6), nn.Flatten()),
                   lambda: (torch.randn(COUNT, 5, 3),)),
        "Conv1D of vectors": (lambda: nn.Sequential(Conv1D(6, 3), nn.Tanh()), lambda: (torch.randn(COUNT, 3),)),
    }  # fmt: skip
    return found


MODELS = models()


def made(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make(), inputs()


def loss(model, batch):
    """A sum with fixed factors, so that no gradients cancel."""
    out = model(*batch)
    return (out * torch.linspace(0.5, 1.5, out.shape[1])).square().sum(1) / 2


def rows_of(batch, rows):
    return tuple(t[rows] for t in batch)


def looped(model, batch):
    total = 0.0
    parameters = dict(sorted(model.named_parameters()))
    for i in range(COUNT):
        grads = torch.autograd.grad(loss(model, rows_of(batch, [i])).sum(), list(parameters.values()))
        flat = torch.cat([g.double().flatten() for g in grads])
        total = total + flat * min(1.0, CLIP / float(flat.norm()))
    return total


def summed(model, batch, rows=tuple(range(COUNT)), **settings):
    ids = torch.tensor(rows)
    out = dpquant.clipped_sum(
        model, loss, rows_of(batch, ids), max_grad_norm=CLIP, record_ids=ids, step=0, seed=0, **settings
    )
    return torch.cat([out.grads[name].double().flatten() for name in sorted(out.grads)])


def assert_is_the_loop(name):
    plain, batch = made(name)
    wanted = looped(plain, batch)
    found = summed(prepare(copy.deepcopy(plain)), batch)
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())


def assert_bounded_and_additive(name, backend="simulate"):
    model, batch = made(name)
    model = prepare(model, format="int8", backend=backend)
    set_policy(model, quantizable_layers(model))
    parts = [summed(model, batch, (i,), microbatch_size=COUNT) for i in range(COUNT)]
    assert all(0 < float(part.norm()) <= CLIP * (1 + 1e-6) for part in parts)
    assert float((sum(parts) - summed(model, batch)).norm()) < 1e-4 * COUNT * CLIP
    full = summed(set_policy(model, ()) or model, batch)
    assert float((sum(parts) - full).norm()) > 1e-5 * float(full.norm())  # something was quantized


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_a_loop_over_single_examples(name, conv1d):
    assert_is_the_loop(name)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_no_example_exceeds_c_and_the_batch_is_the_sum(name, conv1d):
    assert_bounded_and_additive(name)


@pytest.mark.parametrize("name", MODELS)
def test_a_twin_has_the_state_and_the_function_of_its_original(name, conv1d):
    plain, batch = made(name)
    twin = prepare(copy.deepcopy(plain))
    assert quantizable_layers(twin)
    assert twin.state_dict().keys() == plain.state_dict().keys()
    twin.load_state_dict(plain.state_dict())
    torch.testing.assert_close(twin(*batch), plain(*batch), rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(copy.deepcopy(twin))) if "attention" not in name else copy.deepcopy(twin)
    torch.testing.assert_close(again(*batch), twin(*batch), rtol=0, atol=0)
    before = [type(m) for m in plain.modules()]
    assert [type(m) for m in restore(twin).modules()] == before
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), twin.modules(), strict=True))


# Planted bugs.


def test_keys_in_the_rows_of_values_are_caught(monkeypatch):
    honest = WeightLayout.in_rows

    def swapped(self, gradients):
        turned = {(8, 16): (16, 24), (16, 24): (8, 16)}
        return honest(WeightLayout(self.shape, turned.get(self.rows, self.rows)), gradients)

    assert_is_the_loop("attention: all different")
    monkeypatch.setattr(WeightLayout, "in_rows", swapped)
    with pytest.raises(AssertionError):
        assert_is_the_loop("attention: all different")


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_wrong_cross_term_is_caught(monkeypatch, factor):
    assert_is_the_loop("tied")
    monkeypatch.setattr("dpquant.engine.summed.cross_products", lambda *pair: factor * cross_products(*pair))
    with pytest.raises(AssertionError):
        assert_is_the_loop("tied")


def test_a_gate_of_another_step_is_caught(monkeypatch):
    assert_is_the_loop("recurrent: GRU")
    honest = QuantGRU.cell

    def careless(self, a, u, h, c):
        return honest(self, a, u.detach(), h, c)

    monkeypatch.setattr(QuantGRU, "cell", careless)
    with pytest.raises((AssertionError, ModelError)):
        assert_is_the_loop("recurrent: GRU")


# Tied tables.


def contributions(name, **settings):
    """The contributions to the table of a language model, as a step has them."""
    from dpquant.engine.batches import Microbatch
    from dpquant.engine.context import StepContext
    from dpquant.engine.passes import Objective, gradients_of_rows

    model, batch = made(name)
    model = prepare(model, format="int8", backend="simulate")
    set_policy(model, quantizable_layers(model) if settings.get("quantized") else ())
    rows = gradients_of_rows(Objective(model, loss), Microbatch(batch, torch.arange(COUNT), COUNT), StepContext(key=1))
    return rows.parts["table.weight"]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["tied", "tied, no padding"])
def test_a_tied_table_is_normed_as_its_materialised_gradients(name, quantized):
    part = contributions(name, quantized=quantized)
    assert isinstance(part, Summed)
    each = part.per_example().double().flatten(1)
    squares = each.square().sum(1)
    torch.testing.assert_close(part.squared_norms(), squares, rtol=1e-4, atol=0)
    assert bool((part.squared_norms() >= squares * (1 - 1e-6)).all())
    torch.testing.assert_close(part.inner_products(part).double(), squares, rtol=1e-4, atol=0)
    some = part.take(torch.tensor([2, 0]))
    torch.testing.assert_close(some.per_example(), part.per_example()[[2, 0]])
    keep = torch.tensor([True, False, True, True])
    weights = torch.tensor([0.5, 2.0, 0.25, 1.0])
    total = part.begin_sum()
    total.add(part.masked(keep), weights)
    wanted = torch.einsum("b,bvd->vd", (part.factors(weights) * keep).double(), part.per_example().double())
    torch.testing.assert_close(total.value().double(), wanted, rtol=1e-4, atol=1e-4)


def assert_distances_are_those_of_tables(quantized):
    part = contributions("tied", quantized=quantized)
    other = part.take(torch.tensor([1, 0, 2, 2]))
    wanted = (part.per_example() - other.per_example()).double().flatten(1).square().sum(1)
    found = part.squared_distances(other)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-12 * float(wanted.max()))
    assert bool(found[:2].all()) and not float(found[2]) > 1e-12 * float(part.squared_norms()[2])


@pytest.mark.parametrize("quantized", [False, True])
def test_distances_of_a_tied_table_are_those_of_its_gradients(quantized):
    assert_distances_are_those_of_tables(quantized)


def test_distances_of_a_tied_table_make_no_table(monkeypatch):
    part = contributions("tied")
    monkeypatch.setattr(Summed, "per_example", None)
    part.squared_distances(part.take(torch.arange(COUNT).flip(0)))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_wrong_cross_term_of_distances_is_caught(monkeypatch, factor):
    monkeypatch.setattr("dpquant.engine.summed.cross_products", lambda *pair: factor * cross_products(*pair))
    with pytest.raises(AssertionError):
        assert_distances_are_those_of_tables(False)


def assert_added_with_one_factor():
    """What is added for an example is a multiple of its gradient, by at most its weight."""
    part = contributions("tied, no padding", quantized=True)
    each = part.per_example().double()
    for i in range(COUNT):
        total = part.begin_sum()
        total.add(part, torch.eye(COUNT)[i] * 0.7)
        found = total.value().double()
        factor = float((found * each[i]).sum() / each[i].square().sum())
        assert 0.7 * (1 - 2**-7) < factor <= 0.7 * (1 + 1e-6)
        assert float((found - factor * each[i]).norm()) < 1e-5 * float(found.norm())


def test_what_may_cancel_is_added_with_one_factor():
    assert_added_with_one_factor()


def test_factors_that_differ_are_caught(monkeypatch):
    """A lookup that is added with the weight, and codes with the weight rounded down, are not what was normed."""
    monkeypatch.setattr(Summed, "factors", lambda self, weights_B: weights_B)
    with pytest.raises(AssertionError):
        assert_added_with_one_factor()


# Encoders' fast path, dropout, packed sequences, refusals.


@pytest.mark.parametrize("need_padding", [False, True])
def test_an_encoder_in_evaluation_calls_its_layers(need_padding):
    plain = stack()[0].eval()
    x, lengths = torch.randn(COUNT, 5, 8), torch.tensor([5, 2, 1, 3])
    mask = torch.arange(5) >= lengths[:, None] if need_padding else None
    model = prepare(copy.deepcopy(plain), format="luq-fp4", backend="simulate")
    with torch.no_grad():
        wanted = plain(x, src_key_padding_mask=mask)
        kept = slice(None) if mask is None else ~mask
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], wanted[kept], rtol=1e-4, atol=1e-5)
        for name in quantizable_layers(model):
            set_policy(model, [name])
            assert not torch.allclose(model(x, src_key_padding_mask=mask)[kept], wanted[kept], rtol=1e-3, atol=1e-3)


def test_dropout_of_attention_and_between_recurrent_layers_follows_the_record():
    for model, batch in (
        (stack(attention_dropout=0.5), (torch.randn(COUNT, 5, 8),)),
        (Recurrent(nn.LSTM, num_layers=2, dropout=0.5, batch_first=True), (torch.randn(COUNT, 5, 3),)),
    ):
        model = prepare(model.train())
        alone = [summed(model, batch, (i,), microbatch_size=COUNT) for i in range(COUNT)]
        torch.testing.assert_close(sum(alone), summed(model, batch), rtol=1e-4, atol=1e-5)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5] * len(x)), batch_first=True)
        return self.head(self.layer(packed)[1][0][0])


def test_a_packed_sequence_is_refused_unless_all_is_frozen():
    model, batch = prepare(Packed()), (torch.randn(COUNT, 5, 3),)
    with pytest.raises(ModelError, match="PackedSequence"):
        summed(model, batch)
    model.layer.requires_grad_(False)
    assert float(summed(model, batch).norm()) > 0


def test_attention_that_adds_keys_is_refused():
    for settings in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        model = nn.Sequential(nn.MultiheadAttention(8, 2, **settings))
        with pytest.raises(ModelError, match=r"0 \(MultiheadAttention\).*add_bias_kv"):
            check_trainable(model)
        assert type(prepare(model)[0]) is nn.MultiheadAttention
        check_trainable(nn.Sequential(model[0].requires_grad_(False), nn.Linear(2, 2)))


def test_a_subclass_of_a_recurrent_layer_is_refused():
    class Own(nn.LSTM):
        pass

    with pytest.raises(ModelError, match=r"0 \(Own\).*subclass"):
        check_trainable(nn.Sequential(Own(2, 2)))
    check_trainable(nn.Sequential(nn.LSTM(2, 2)))
    check_trainable(prepare(nn.Sequential(nn.LSTM(2, 2))))


def test_attention_says_what_it_wants():
    attention, x = prepare(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(COUNT, 5, 8)
    assert isinstance(attention, QuantMultiheadAttention)
    for words, given in (
        ("attn_mask where is_causal", {"is_causal": True}),
        ("attn_mask of", {"attn_mask": torch.zeros(3, 3)}),
        ("key_padding_mask of", {"key_padding_mask": torch.zeros(3, 5)}),
    ):
        with pytest.raises(ModelError, match=words):
            attention(x, x, x, **given)
    with pytest.raises(ModelError, match="one axis of examples"):
        attention(x, x[:2], x[:2])
    with pytest.raises(ModelError, match=r"\(B, 4, L\)|\(B, 4, W\)"):
        prepare(nn.Conv1d(4, 2, 3))(torch.randn(4, 9))


def test_examples_without_an_axis_are_taken_as_torch_takes_them():
    for plain, shape in ((nn.MultiheadAttention(8, 2, batch_first=True), (5, 8)), (nn.LSTM(3, 4), (5, 3))):
        x = torch.randn(shape)
        inputs = (x, x, x) if isinstance(plain, nn.MultiheadAttention) else (x,)
        wanted = plain(*inputs)[0]
        twin = prepare(copy.deepcopy(plain), format="int8", backend="simulate")
        torch.testing.assert_close(twin(*inputs)[0], wanted, rtol=1e-4, atol=1e-5)
        set_policy(twin, [""] if isinstance(plain, nn.LSTM) else ["", "out_proj"])
        torch.testing.assert_close(twin(*inputs)[0], wanted, rtol=0.1, atol=0.1)


def test_first_states_are_given_to_the_examples():
    plain, x = nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.randn(COUNT, 5, 3)
    states = torch.randn(2, COUNT, 4), torch.randn(2, COUNT, 4)
    twin = prepare(copy.deepcopy(plain), format="int8", backend="simulate")
    set_policy(twin, [""])
    y, (h, c) = twin(x, states)
    wanted, (h2, c2) = plain(x, states)
    for ours, theirs in ((y, wanted), (h, h2), (c, c2)):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)
    with pytest.raises(ModelError, match="first states"):
        twin(x, (states[0][:1], states[1]))


def test_multiplications_are_those_of_the_products():
    x, memory, _ = attended()
    model = prepare(Attend(first(lambda a, x, m: a(x, m, m))))
    macs = count_macs(model, lambda: model(x[:1], memory[:1], None))
    assert macs == {"attention": 5 * 64 + 2 * 3 * 64, "attention.out_proj": 5 * 64}
    layer = prepare(nn.LSTM(3, 4, num_layers=2, batch_first=True))
    assert count_macs(layer, lambda: layer(torch.randn(1, 5, 3))) == {"": 5 * (16 * 3 + 16 * 4)}
    layer = prepare(nn.Conv3d(4, 6, 3))
    assert count_macs(layer, lambda: layer(torch.randn(1, 4, 4, 5, 6))) == {"": 2 * 3 * 4 * 6 * 4 * 27}


def test_the_transposed_twin_is_found_by_the_class_alone(conv1d):
    model = prepare(nn.Sequential(Conv1D(6, 3)))
    assert type(model[0]) is QuantTransposedLinear
    macs = count_macs(model, lambda: model(torch.randn(1, 5, 3)))
    assert macs == {"0": 5 * 6 * 3}


def test_a_rows_layout_is_its_own_adjoint():
    layout = WeightLayout(torch.Size((6, 3)), (2, 4))
    parameter, part = torch.randn(6, 3), torch.randn(2, 3, 1, 1)
    assert torch.equal((layout.of(parameter, (1, 1)) * part).sum(), (parameter * layout.full(part)).sum())
    turned = WeightLayout(torch.Size((3, 2)), transposed=True)
    parameter = torch.randn(3, 2)
    torch.testing.assert_close((turned.of(parameter, (1, 1)) * part).sum(), (parameter * turned.full(part)).sum())
    assert F.pad(torch.ones(1), (1, 1)).sum() == 1
