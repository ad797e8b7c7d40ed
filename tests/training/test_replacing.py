# SPDX-License-Identifier: Apache-2.0
"""A run goes on from values that others have released: nothing of the former ones is left, and nothing is excused."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.training.start import make_private
from networks import loss

PLAN = dpquant.PrivacyPlan(
    noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.2, expected_batch_size=8, steps=6
)


class Net(nn.Module):
    """A frozen layer, a trained one, and a buffer that says how inputs are shifted."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("shift", torch.zeros(1))
        self.frozen, self.trained = nn.Linear(16, 12), nn.Linear(12, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.trained(torch.relu(self.frozen(x.flatten(1) + self.shift)))


def run_of(net, lr=0.0):
    """A repeatable run whose layers are all quantized; without a learning rate it moves nothing."""
    generator = torch.Generator().manual_seed(0)
    records = TensorDataset(
        torch.randn(40, 1, 4, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    )
    optimizer = torch.optim.SGD(net.trained.parameters(), lr=lr)
    return make_private(
        net, optimizer, records, loss_fn=loss, plan=PLAN, policy=dpquant.AllPolicy(), format="luq-fp4",
        backend="simulate", microbatch_size=4, mechanism_seed=3,
    )  # fmt: skip


def batches(private):
    for epoch in private.epochs():
        yield from epoch


def gradients(private):
    return [p.grad.clone() for p in private.model.parameters() if p.requires_grad]


def by_the_run(private, values):
    private.replace_weights(values)


def past_the_cache(private, values):
    """What a write through `.data` does: codes of a frozen weight stay as they were."""
    for name, p in private.model.named_parameters():
        p.data.copy_(values[name])


def not_at_all(private, values):
    pass


def assert_goes_on_from(replace):
    """The second step's noised gradients are those of a run that had the values from the first."""
    values = Net(1).state_dict()
    changed, same = run_of(Net(0)), run_of(Net(1))
    for private in (changed, same):
        drawn = batches(private)
        private.step(next(drawn))
        if private is changed:
            replace(private, values)
        private.step(next(drawn))
        drawn.close()
    assert all(torch.equal(a, b) for a, b in zip(gradients(changed), gradients(same), strict=True))


def test_nothing_of_the_former_values_is_left():
    assert_goes_on_from(by_the_run)


@pytest.mark.parametrize("planted", [past_the_cache, not_at_all])
def test_what_is_left_of_them_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_goes_on_from(planted)


def goes_on_with_another_buffer(private, replace):
    """Replace all values between two steps, the buffer by an average that was rounded."""
    drawn = batches(private)
    private.step(next(drawn))
    replace({**private.model.state_dict(), "shift": torch.full((1,), 1e-7)})
    for batch in drawn:
        private.step(batch)


def test_a_buffer_that_the_server_has_averaged_is_no_buffer_that_has_taken_in_records():
    private = run_of(Net(0), lr=0.1)
    goes_on_with_another_buffer(private, private.replace_weights)
    assert private.steps_taken == PLAN.steps and "DOES NOT HOLD" not in private.statement()


def test_without_the_runs_knowledge_it_would_be():
    private = run_of(Net(0), lr=0.1)
    with pytest.raises(ModelError, match="buffer shift has begun to change"):
        goes_on_with_another_buffer(private, private.model.load_state_dict)


def test_a_buffer_that_has_taken_in_records_is_not_excused():
    private = run_of(Net(0), lr=0.1)
    drawn = batches(private)
    private.step(next(drawn))
    private.model.shift.add_(1)  # as a forward pass might
    with pytest.raises(ModelError, match="buffer shift has begun to change"):
        private.replace_weights(Net(0).state_dict())
    assert "DOES NOT HOLD" in private.statement()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop("trained.bias"), r"in which trained\.bias is .*got some in which it is absent"),
        (lambda values: values.update({"trained.bias": torch.zeros(4)}), r"trained\.bias is \(\(3,\)"),
        (lambda values: values.update({"trained.bias": torch.zeros(3).double()}), "float64"),
        (lambda values: values.update({"other": torch.zeros(3)}), "in which other is absent"),
    ],
)
def test_values_of_another_model_are_refused_and_none_is_taken(change, said):
    private, values = run_of(Net(0)), Net(1).state_dict()
    change(values)
    before = {name: t.clone() for name, t in private.model.state_dict().items()}
    with pytest.raises(DataError, match=said):
        private.replace_weights(values)
    assert all(torch.equal(before[name], t) for name, t in private.model.state_dict().items())


def test_in_the_middle_of_a_step_they_are_refused():
    private = run_of(Net(0))
    drawn = batches(private)
    next(drawn)
    with pytest.raises(SettingError, match="was skipped"):
        private.replace_weights(Net(1).state_dict())
