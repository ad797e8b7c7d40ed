# SPDX-License-Identifier: Apache-2.0
"""Small data sets that write down which thread reads them, and whole runs on them."""

import random
import threading

import torch
from torch import nn
from torch.utils.data import Dataset

import dpquant
from dpquant.privacy.mechanism import Mechanism
from mechanisms import begun, finish, with_doubles
from networks import loss

COUNT = 40


class Items(Dataset):
    """Records with labels, which a transform changes at random."""

    def __init__(self, noise=0.1, before=lambda: None):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(COUNT, 6, generator=generator)
        self.labels = torch.randint(0, 5, (COUNT,), generator=generator)
        self.noise, self.before, self.readers = noise, before, set()

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.readers.add(threading.current_thread() is threading.main_thread())
        self.before()
        jitter = self.noise * (torch.randn(6) + random.random()) if self.noise else 0.0
        return self.inputs[index] + jitter, self.labels[index]


class Collating(Items):
    """The same without a transform, collated by itself."""

    def dpquant_batch(self, record_ids):
        self.readers.add(threading.current_thread() is threading.main_thread())
        return self.inputs[record_ids], self.labels[record_ids]


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 5))


def plan_of(steps=4):
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=20, steps=steps
    )


def trained(records, make_run, network=dropping, workers=1, **doubles):
    run = begun(
        network(), records, loss_fn=loss, plan=plan_of(), policy=dpquant.AllPolicy(), make_run=make_run,
        mechanism=with_doubles(Mechanism.repeatable(3, None), **doubles), microbatch_size=4, backend="simulate",
        workers=workers,
    )  # fmt: skip
    if hasattr(records, "readers"):
        records.readers.clear()
    return finish(run)
