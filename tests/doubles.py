# SPDX-License-Identifier: Apache-2.0
"""What tests hand to a run in place of something else: a user's models, named `doubles:NAME`, and sinks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dpquant.data import models
from dpquant.privacy.ledger import Ledger
from dpquant.runs.sinks import Sink


class Told(Sink):
    """Keeps what it is told: (method, what), in order."""

    def __init__(self):
        self.all = []

    def started(self, plan, settings):
        self.all.append(("started", (plan, settings)))

    def stepped(self, progress):
        self.all.append(("stepped", progress))

    def epoch_ended(self, epoch):
        self.all.append(("epoch_ended", epoch))

    def finished(self, record):
        self.all.append(("finished", record))

    def of(self, method):
        """What one method was told."""
        return [what for name, what in self.all if name == method]


class Stops(Sink):
    """The user, who stops a run after so many steps."""

    def __init__(self, steps):
        self._steps = steps

    def stepped(self, progress):
        if progress.step == self._steps:
            raise KeyboardInterrupt


BUILT: list[torch.nn.Module] = []
"""Models of `observed`, the newest last: a run trains that very object."""


def observed(num_classes, input_shape):
    """The network for digits, kept where a test can look into it."""
    BUILT.append(models.build("cnn", num_classes=num_classes, input_shape=input_shape))
    return BUILT[-1]


_interrupted: list[tuple[Path, int]] = []


@contextlib.contextmanager
def interrupted(ledger: Path, steps: int) -> Iterator[None]:
    """In the block, `interrupting` and `interrupting_research` stop their run: by this ledger, after so many steps."""
    _interrupted.append((ledger, steps))
    try:
        yield
    finally:
        _interrupted.pop()


def interrupting(num_classes, input_shape):
    """The network for digits, in which the user's Ctrl-C arrives; for no steps, while it is built."""
    ledger, steps = _interrupted[-1]
    if steps == 0:
        raise KeyboardInterrupt
    return Interrupting(models.build("cnn", num_classes=num_classes, input_shape=input_shape), ledger, steps)


def interrupting_research(num_classes, input_shape):
    """Interrupts while it is built a run whose ledger says that its charges came from a seed."""
    ledger, steps = _interrupted[-1]
    ledger.parent.mkdir(exist_ok=True)
    Ledger(ledger, research=True).charge(kind="train", sample_rate=0.1, noise_multiplier=1.0, count=steps)
    raise KeyboardInterrupt


class Interrupting(torch.nn.Module):
    """Raises KeyboardInterrupt in step number `steps`: the ledger shows the first, the weights the others."""

    def __init__(self, net, ledger, steps):
        super().__init__()
        self.net, self._ledger, self._steps, self._seen = net, ledger, steps, set()

    def forward(self, x):
        if self._ledger.exists() and any(event.kind == "train" for event in Ledger.read(self._ledger)):
            self._seen.add(float(next(self.net.parameters()).detach().double().sum()))
            if len(self._seen) == self._steps:
                raise KeyboardInterrupt
        return self.net(x)


def with_batch_norm(num_classes, input_shape):
    return torch.nn.Sequential(
        torch.nn.Conv2d(input_shape[0], 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, num_classes),
    )


def with_too_few_outputs():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9))


def for_larger_images():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))


class OfTexts(torch.nn.Module):
    """A convolution over a text's tokens, which reads `width` of them together."""

    def __init__(self, vocabulary, classes, width):
        super().__init__()
        self.words = torch.nn.Embedding(vocabulary, 4)
        self.conv = torch.nn.Conv1d(4, classes, width)

    def forward(self, inputs):
        words = self.words(inputs["input_ids"]) * inputs["attention_mask"][..., None]
        return self.conv(words.mT).amax(2)


class OfTensorsByName(OfTexts):
    def forward(self, input_ids, attention_mask):
        return super().forward({"input_ids": input_ids, "attention_mask": attention_mask})


def of_texts(num_classes, vocabulary):
    return OfTexts(vocabulary, num_classes, 16)


def of_longer_texts(num_classes, vocabulary):
    return OfTexts(vocabulary, num_classes, 17)


def of_texts_by_name(num_classes, vocabulary):
    return OfTensorsByName(vocabulary, num_classes, 16)


class SharedNet(torch.nn.Module):
    """Two convolutions of one weight, one of them used twice, as asked for."""

    def __init__(self, tied, twice):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.head = torch.nn.Linear(8, 10)
        if tied:
            self.c.weight = self.b.weight
        if twice:
            self.again = self.b
        self.last = self.b if twice else torch.nn.Identity()

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.last):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def tied():
    return SharedNet(tied=True, twice=False)


def used_twice():
    return SharedNet(tied=False, twice=True)


def shared():
    return SharedNet(tied=True, twice=True)


class that_remembers(torch.nn.Module):
    """Random features, so many that no two images of noise have much in common: each is learnt by heart."""

    def __init__(self):
        super().__init__()
        features = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        self.register_buffer("features", features)
        self.head = torch.nn.Linear(4096, 10)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head((x.flatten(1) @ self.features).sign())


class rows_that_are_remembered(torch.nn.Module):
    """The same for rows of a table: cosines so fast that no two rows have much in common."""

    def __init__(self, input_shape):
        super().__init__()
        features = 3000 * torch.randn(*input_shape, 4096, generator=torch.Generator().manual_seed(0))
        self.register_buffer("features", features)
        self.head = torch.nn.Linear(4096, 2)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head((x @ self.features).cos())


class Plain(torch.nn.Module):
    """A network for digits, with something wrong in a subclass."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


class with_a_word_in_its_state(Plain):
    def get_extra_state(self):
        return "a word"

    def set_extra_state(self, state):
        pass


class with_half_a_tensor(Plain):
    def __init__(self):
        super().__init__()
        whole = torch.zeros(8)
        self.register_buffer("low", whole[:5])
        self.register_buffer("high", whole[3:])


class that_saves_another(Plain):
    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(fixed(state)))


def fixed(state):
    """Other values than the parameters', shapes as they are."""
    return {"head.bias": state["head.bias"] + 1}


class that_cannot_evaluate(Plain):
    def forward(self, x):
        return super().forward(x if self.training else x[0, 0, 0, 0])


class that_evaluates_to_pairs(Plain):
    def forward(self, x):
        found = super().forward(x)
        return found if self.training else torch.stack([found, found], 2)


class that_fails_on_records(Plain):
    def forward(self, x):
        if not self.training and (x == -1).any():  # as the background of a digit is
            raise ValueError(f"secret {x.flatten()[:3].tolist()}")
        return super().forward(x)


class Dies(Sink):
    """SIGKILL, as far as files go: nothing is tidied up after so many steps."""

    class Killed(BaseException):
        pass

    def __init__(self, steps):
        self._steps = steps

    def stepped(self, progress):
        if progress.step == self._steps:
            raise Dies.Killed
