# SPDX-License-Identifier: Apache-2.0
"""Sums that are exact over microbatches: their sensitivity with rounding, and that they are the ordinary sums."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import clipped_sum_of, step_key
from dpquant.engine.exact_sum import LARGEST_BATCH, check_exact, exact_grid, exact_sum_of, most_microbatches, on_grid
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.privacy.mechanism import Mechanism
from mechanisms import begun, finish
from networks import loss

C, RECORDS, SIZE = 0.7, 21, 4


def objective():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return Objective(dpquant.prepare(model, format="luq-fp4", backend="simulate"), loss)


def data():
    torch.manual_seed(2)
    return 20 * torch.randn(RECORDS, 1, 6, 6), torch.randint(0, 5, (RECORDS,))


def sums(objective, batch, ids, of=exact_sum_of):
    pieces = microbatches(batch, ids, SIZE)
    return of(objective, pieces, max_grad_norm=C, key=step_key(0, 0))


def flat(found):
    scale = 1.0 if found.grid is None else found.grid
    return torch.cat([one.double().flatten() for one in found.grads.values()]) * scale


def test_an_exact_sum_is_the_ordinary_one_up_to_round_off():
    one, ids = objective(), torch.arange(RECORDS)
    exact, plain = sums(one, data(), ids), sums(one, data(), ids, of=clipped_sum_of)
    assert all(total.dtype == torch.int64 for total in exact.grads.values()) and exact.grid == exact_grid(C)
    assert (flat(exact) - flat(plain)).norm() <= 2e-5 * flat(plain).norm()


def test_it_does_not_depend_on_the_order_of_the_microbatches():
    one, pieces = objective(), list(microbatches(data(), torch.arange(RECORDS), SIZE))

    def of(pieces, sum_of):
        found = sum_of(one, pieces, max_grad_norm=C, key=step_key(0, 0))
        return torch.cat([total.flatten() for total in found.grads.values()])

    orders = [pieces, pieces[::-1], pieces[3:] + pieces[:3], pieces[::2] + pieces[1::2]]
    exact = [of(order, exact_sum_of) for order in orders]
    assert all(torch.equal(one, exact[0]) for one in exact)
    assert torch.equal(of(pieces[::2], exact_sum_of) + of(pieces[1::2], exact_sum_of), exact[0])
    plain = [of(order, clipped_sum_of) for order in orders]  # the control
    assert not all(torch.equal(one, plain[0]) for one in plain)


def largest_move(sum_of=exact_sum_of):
    """The largest move of the sum by one record, which is removed, so that the ones after it change microbatches."""
    one, batch = objective(), data()
    ids = torch.arange(RECORDS)
    whole = flat(sums(one, batch, ids, of=sum_of))
    moves = []
    for left in range(0, RECORDS, 3):
        kept = ids[ids != left]
        moves.append((whole - flat(sums(one, tuple(leaf[kept] for leaf in batch), kept, of=sum_of))).norm())
    return float(max(moves))


def test_a_record_moves_an_exact_sum_by_the_clipping_norm_at_most():
    """Records with large gradients, which are clipped; the margin is a 2^17th, and nothing less would do."""
    assert 0.99 * C < largest_move() <= C * (1 - 2.0**-18)


def test_a_record_is_clipped_below_the_norm_by_the_margin():
    """That is what its rounding may move the sum by."""
    one, ids = objective(), torch.arange(1)
    exact, plain = flat(sums(one, data(), ids)).norm(), flat(sums(one, data(), ids, of=clipped_sum_of)).norm()
    assert plain > 0.99 * C and abs(exact / plain - (1 - 2.0**-17)) < 2.0**-20


def test_a_coarse_grid_moves_more(in_steps=5):
    def coarse(objective, pieces, *, max_grad_norm, key):
        """Each microbatch's sum on a grid as coarse as a 32nd of the norm."""
        grid, totals = max_grad_norm * 2.0**-in_steps, None
        for piece in pieces:
            found = clipped_sum_of(objective, [piece], max_grad_norm=max_grad_norm, key=key)
            rounded = {name: on_grid(one, grid) for name, one in found.grads.items()}
            totals = rounded if totals is None else {name: totals[name] + rounded[name] for name in totals}
        return type(found)(grads=totals, sensitivity=max_grad_norm, grid=grid)

    assert largest_move(coarse) > C


@pytest.mark.parametrize("num_values", [10, 11_000_000, 10**9])
def test_the_margin_covers_the_worst_rounding(num_values):
    microbatches = most_microbatches(num_values)
    assert microbatches * num_values**0.5 * exact_grid(1.0) <= 2.0**-17 * (1 + 1e-12)
    expected = int((microbatches - 64) // 4)
    if expected < LARGEST_BATCH:
        check_exact(num_values, expected, 1)
        with pytest.raises(SettingError, match="larger microbatches"):
            check_exact(num_values, expected + 2, 1)
    with pytest.raises(SettingError, match="at most 1048576"):
        check_exact(num_values, LARGEST_BATCH + 1, 2**19)


def test_the_largest_batch_does_not_overflow():
    most = 8 * LARGEST_BATCH - 1  # records of the clipping norm, all in one value
    assert int(on_grid(torch.tensor(1.0), exact_grid(1.0))) * most < 2**63 - 1
    assert int(on_grid(torch.tensor(1.0), exact_grid(1.0))) * 8 * LARGEST_BATCH >= 2**63  # and no more would fit


def trained(exact_sums):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    records = list(zip(torch.randn(40, 1, 6, 6), torch.randint(0, 5, (40,)), strict=True))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=C, sample_rate=0.25, expected_batch_size=10, steps=3
    )
    run = finish(
        begun(
            model, records, loss_fn=loss, plan=plan, policy=dpquant.NonePolicy(), microbatch_size=4,
            mechanism=Mechanism.repeatable(3, None), exact_sums=exact_sums,
        )
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_an_exact_run_is_an_ordinary_one_up_to_round_off():
    exact, plain = trained(True), trained(False)
    assert 0 < (exact - plain).norm() <= 1e-5 * plain.norm()
