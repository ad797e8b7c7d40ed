# SPDX-License-Identifier: Apache-2.0
"""The same training with dpquant: python examples/opacus/after.py [EPOCHS]."""

import sys

import torch
from digits import accuracy, network, train_set
from torch.nn import functional as F
from torch.optim import SGD

import dpquant


def per_example_loss(model, batch):
    """Return the loss of each example."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
model = dpquant.fix(network())
optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)

private = dpquant.make_private(
    model,
    optimizer,
    train_set,
    loss_fn=per_example_loss,
    plan=dpquant.PrivacyPlan.for_epochs(
        records=1440,  # about, and public
        batch_size=256,
        epochs=epochs,
        epsilon=8.0,
        delta=1e-4,
        max_grad_norm=1.0,
        analysis=False,  # no layer has to be chosen
    ),
    policy=dpquant.AllPolicy(),
    format="auto",  # int8 in layers that gain by it here
)

for epoch in private.epochs():
    for batch in epoch:
        private.step(batch)

print(f"epsilon {private.epsilon_spent():.2f}")
print(f"accuracy {accuracy(model):.3f}")
torch.save(dpquant.restore(model).state_dict(), "after.pt")
