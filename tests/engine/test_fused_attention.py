# SPDX-License-Identifier: Apache-2.0
"""The kernels of attention: right in every layout, by each example alone, in place of torch's only during a step."""

import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_leaves import B, by_loop, summed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dpquant
from dpquant.engine.fused_attention import KERNELS, FusedAttention, attention, fused_attention

TORCHS = F.scaled_dot_product_attention
needs_kernel = pytest.mark.skipif(not KERNELS, reason="the native module was not built, or has no kernel for this CPU")


def heads(B: int, N: int, L: int, E: int, seed: int, *, projected: bool = True) -> Tensor:
    """Return numbers `(B, N, L, E)`, in memory as a projection leaves them or contiguous."""
    x = torch.randn(B, L, N, E, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)
    return (x if projected else x.contiguous()).requires_grad_()


def masks(kind: str, B: int, N: int, L: int, S: int) -> Tensor | None:
    """Return a mask of a kind that models use, in which the last keys of some examples are padding."""
    lengths = torch.arange(B) % S + 1
    seen = (torch.arange(S) < lengths[:, None])[:, None, None]
    numbers = torch.randn(N, L, S, generator=torch.Generator().manual_seed(9))
    return {
        "none": None,
        "padding": seen,
        "padding of each query": seen.expand(B, 1, L, S),
        "numbers": numbers,
        "least number": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "columns first": numbers.transpose(1, 2).contiguous().transpose(1, 2),
    }[kind]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, **options) -> list[Tensor]:
    """Return output and gradients by torch's plain operators in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        y = TORCHS(*leaves, mask, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def by_kernel(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, **options
) -> list[Tensor]:
    """Return output and gradients by one kernel."""
    if mask is not None:
        added = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask.contiguous()
        mask = added.expand(*q.shape[:3], k.shape[2])
    y = FusedAttention.apply(
        q, k, v, mask, options.get("scale", q.shape[3] ** -0.5), options.get("is_causal", False), kernel
    )
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]


def error(found: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest error of output and gradients, each relative to its largest entry or to 1."""
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, right, strict=True)
    )


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS or [""]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 130), st.integers(1, 70)),
    features=st.sampled_from([16, 32, 48, 64, 80]),
    mask=st.sampled_from(
        ["none", "padding", "padding of each query", "numbers", "least number", "columns first", "causal"]
    ),
    projected=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.3]),
)
def test_is_attention_and_its_gradients(kernel, sizes, features, mask, projected, scale) -> None:
    B, N, L, S = sizes
    q, k, v = (heads(B, N, rows, features, i, projected=projected) for i, rows in enumerate((L, S, S)))
    grad = heads(B, N, L, features, 3, projected=not projected).detach()
    options = {} if scale is None else {"scale": scale}
    added = None if mask == "causal" else masks(mask, B, N, L, S)
    options |= {"is_causal": True} if mask == "causal" else {}
    assert error(by_kernel(kernel, q, k, v, added, grad, **options), exact(q, k, v, added, grad, **options)) < 2e-5


@needs_kernel
@pytest.mark.parametrize("mask", ["none", "padding", "padding of each query", "numbers", "columns first"])
def test_is_called_as_torchs(mask: str) -> None:
    q, k, v = (heads(3, 2, 5, 16, i) for i in range(3))
    grad, given = heads(3, 2, 5, 16, 3).detach(), masks(mask, 3, 2, 5, 5)
    y = attention(q, k, v, given)
    assert "FusedAttention" in type(y.grad_fn).__name__
    assert error([y.detach(), *torch.autograd.grad(y, (q, k, v), grad)], exact(q, k, v, given, grad)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_far_apart_and_masked_rows(kernel: str) -> None:
    q, k, v = (heads(1, 1, 3, 16, i) for i in range(3))
    grad = heads(1, 1, 3, 16, 3).detach()
    mask = torch.tensor([[0.0, -300.0, -88.5], [-math.inf] * 3, [-math.inf, 0.0, -20.0]])
    y, grad_q, grad_k, grad_v = by_kernel(kernel, q, k, v, mask, grad)
    assert not y[:, :, 1].any() and not grad_q[:, :, 1].any()  # zeros, as torch has them: no key is seen
    seen = [0, 2]
    right = exact(q[:, :, seen], k, v, mask[seen], grad[:, :, seen])
    assert error([y[:, :, seen], grad_q[:, :, seen], grad_k, grad_v], right) < 1e-5
    large = by_kernel(kernel, q, k, v, None, grad, scale=1e30)  # one key has all the weight
    assert all(x.isfinite().all() for x in large)


@needs_kernel
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_example(kernel: str, value: float) -> None:
    q, k, v = (heads(3, 2, 20, 16, i) for i in range(3))
    grad = heads(3, 2, 20, 16, 3).detach()
    right = by_kernel(kernel, q, k, v, None, grad)
    for place in range(3):
        broken = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with torch.no_grad():
            broken[place][1, 0, 4, 2] = value
        found = by_kernel(kernel, *broken, None, grad)
        assert not all(x[1].isfinite().all() for x in found)
        if math.isnan(value):
            assert found[0][1, 0, 4].isnan().any()  # and no probability of zero in place of it
        for a, b in zip(found, right, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert torch.equal(a[1, 1], b[1, 1])


@needs_kernel
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_bit_follows_from_batchmates_or_threads(kernel: str) -> None:
    q, k, v = (heads(5, 3, 37, 32, i) for i in range(3))
    mask, grad = masks("padding of each query", 5, 3, 37, 37), heads(5, 3, 37, 32, 3).detach()
    together = by_kernel(kernel, q, k, v, mask, grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for row in (0, 4):
            one = slice(row, row + 1)
            alone = by_kernel(kernel, *(x[one].detach().requires_grad_() for x in (q, k, v)), mask[one], grad[one])
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b[one])
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_keeps_queries_keys_and_values_only() -> None:
    kept: list[Tensor] = []
    q, k, v = (heads(2, 2, 20, 16, i) for i in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        attention(q, k, v)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (q, k, v)]


def test_leaves_to_torch_what_it_does_not_compute() -> None:
    q, k, v = (heads(2, 2, 5, 16, i) for i in range(3))
    trained = torch.zeros(5, 5, requires_grad=True)
    wide = [heads(2, 2, 5, 24, i) for i in range(3)]
    cases = [
        ((q, k, v), {"dropout_p": 0.5}),
        ((q, k[:, :1], v[:, :1]), {"enable_gqa": True}),
        ((q, k, v, trained), {}),
        ((q.double(), k.double(), v.double()), {}),
        (wide, {}),
        ((q[0], k[0], v[0]), {}),
        ((q, k, v[..., :8]), {}),
        ((q, k[:1], v[:1]), {}),
        ((q[:, :, :0], k, v), {}),
        ((q, k, v, torch.zeros(2, 1, 5, 1)), {}),
    ]
    for args, options in cases:
        torch.manual_seed(0)
        y = attention(*args, **options)
        torch.manual_seed(0)
        assert torch.equal(y, TORCHS(*args, **options)), options
        assert "FusedAttention" not in type(y.grad_fn).__name__
    attention(q, k, v, trained).sum().backward()
    assert trained.grad is not None
    of_each = torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that vmap is slow
        assert torch.allclose(of_each(q, k, v), TORCHS(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        lambda q, k, v: (q, k, v, torch.zeros(4, 4)),
        lambda q, k, v: (q, k, v, torch.zeros(5, 5), 0.0, True),
        lambda q, k, v: (q, k[..., :8], v[..., :8]),
        lambda q, k, v: (q, k, v, torch.zeros(1, 2, 2, 5, 5, dtype=torch.int64)),
    ],
)
def test_raises_as_torch_does(arguments) -> None:
    args = arguments(*(heads(2, 2, 5, 16, i) for i in range(3)))
    with pytest.raises(Exception) as torchs:
        TORCHS(*args)
    with pytest.raises(type(torchs.value)) as ours:
        attention(*args)
    assert str(ours.value) == str(torchs.value)


@needs_kernel
def test_refuses_a_second_derivative() -> None:
    q, k, v = (heads(1, 1, 4, 16, i) for i in range(3))
    (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_stands_in_torchs_place_while_a_block_runs() -> None:
    with pytest.raises(KeyError), fused_attention(), fused_attention():
        assert F.scaled_dot_product_attention is attention
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS


def test_a_block_that_ends_leaves_those_of_other_threads() -> None:
    inside, end = threading.Event(), threading.Event()

    def other() -> None:
        with fused_attention():
            inside.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    with fused_attention():
        thread.start()
        assert inside.wait(10)
    assert F.scaled_dot_product_attention is attention
    end.set()
    thread.join()
    assert F.scaled_dot_product_attention is TORCHS


class Attending(nn.Module):
    """A layer of attention, which notes what computed it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 3)
        self.found: set[object] = set()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        self.found.add(F.scaled_dot_product_attention)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def test_a_step_uses_it_and_sums_what_a_loop_of_autograd_does() -> None:
    torch.manual_seed(0)
    model, batch = Attending(), (torch.randn(B, 9, 32), torch.arange(B) % 3)
    right = by_loop(model, batch)
    assert model.found == {TORCHS}
    model.found.clear()
    found = summed(dpquant.prepare(model), batch)
    assert model.found == {attention}
    assert found.keys() == right.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, right[name].float(), atol=1e-6), name
