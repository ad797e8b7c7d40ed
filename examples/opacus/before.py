# SPDX-License-Identifier: Apache-2.0
"""A training with Opacus: python examples/opacus/before.py [EPOCHS]."""

import sys

import torch
from digits import accuracy, network, train_set
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
model = ModuleValidator.fix(network())
optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(train_set, batch_size=256),
    epochs=epochs,
    target_epsilon=8.0,
    target_delta=1e-4,
    max_grad_norm=1.0,
)

for _ in range(epochs):
    with BatchMemoryManager(
        data_loader=loader,
        max_physical_batch_size=64,
        optimizer=optimizer,
    ) as batches:
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

print(f"epsilon {engine.get_epsilon(1e-4):.2f}")
print(f"accuracy {accuracy(model):.3f}")
torch.save(model._module.state_dict(), "before.pt")
