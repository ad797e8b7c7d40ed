# SPDX-License-Identifier: Apache-2.0
"""What a model's code does with tensors in disguise is done to the tensor of each example; all axes are its own."""

import pytest
import torch
import torch.nn.functional as F

from dpquant.engine.disguise import Disguised

B, T, H = 3, 4, 2

CHAINS = {
    "turned round": lambda t: t.permute([2, 0, 1]).unsqueeze(0),
    "by functions of torch": lambda t: torch.unsqueeze(torch.permute(t, (2, 0, 1)), 0),
    "scaled": lambda t: (2 * t - 1).transpose(0, 2)[None] / 3,
    "cut": lambda t: (-t.permute(2, 0, 1)[None])[:, :, -2:, :].contiguous().to(torch.float64),
    "reshaped": lambda t: t.view(T * T, H).t().reshape(1, H, T, T) + 1.0,
    "with a number in a tensor": lambda t: t.movedim(-1, 0)[None] * torch.tensor(0.5),
}


@pytest.fixture
def each():
    return torch.randn(B, T, T, H, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("chain", CHAINS)
def test_each_tensor_meets_its_own_example(chain, each):
    made, wanted = CHAINS[chain](Disguised(each)), torch.cat([CHAINS[chain](one) for one in each])
    scores = torch.randn(wanted.shape)
    assert isinstance(made, Disguised) and made.shape == made.size() == (1, *wanted.shape[1:])
    assert len(made) == 1 and made.dtype == wanted.dtype and made.dim() == made.ndim == 4
    for met in (scores + made, made + scores, torch.add(scores, made), scores.clone().to(wanted.dtype).add_(made)):
        assert torch.equal(met, scores + wanted)
    assert torch.equal(made.expand(B, -1, -1, -1), wanted) and torch.equal(made.expand_as(wanted), wanted)
    (found,) = torch.autograd.grad(((scores + made) ** 2).sum(), each)
    assert torch.equal(found, torch.autograd.grad(((scores + wanted) ** 2).sum(), each)[0])


def test_attention_takes_it_for_its_mask(each):
    q, bias = torch.randn(B, H, T, 5), each.permute(0, 3, 1, 2)
    found = F.scaled_dot_product_attention(q, q, q, attn_mask=Disguised(each).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, attn_mask=bias))


@pytest.mark.parametrize(
    "meet",
    [
        lambda t: t + torch.zeros(T, T, H),
        lambda t: torch.cat([t, torch.zeros(T, T, H)]),
        lambda t: t.expand(2, T, T, H),
    ],
    ids=["added", "joined", "expanded"],
)
def test_without_an_axis_for_the_examples_nothing_is_met(meet, each):
    with pytest.raises(TypeError, match="no axis for the examples"):
        meet(Disguised(each))
