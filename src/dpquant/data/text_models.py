# SPDX-License-Identifier: Apache-2.0
"""Networks for texts: a small one, and pretrained ones from a folder of this machine, whole or by LoRA.

A network takes the inputs of a batch, {"input_ids", "attention_mask" and, of pairs, "token_type_ids"}: int64
[B, tokens], and returns [B, classes].
"""

import contextlib
import fnmatch
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpquant.data.sizes import HF_PREFIX
from dpquant.errors import ModelError, did_you_mean, quoted

_WIDTH = 64
_LORA_ALPHA = 2  # times the rank: the update's factor


class EmbeddingMean(nn.Module):
    """Mean of a text's token embeddings, and a network with one hidden layer on it."""

    def __init__(self, vocabulary: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        size = max(1, round(_WIDTH * width))
        self.embedding = nn.Embedding(vocabulary, size)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, num_classes)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits [B, classes]; padding takes no part."""
        mask = inputs["attention_mask"][:, :, None].float()
        mean = (self.embedding(inputs["input_ids"]) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.output(self.hidden(mean).relu())


class Pretrained(nn.Module):
    """A classifier of transformers, called with the inputs that it takes, and returning its logits alone."""

    def __init__(self, network: nn.Module, takes: frozenset[str]) -> None:
        super().__init__()
        self.network, self._takes = network, takes

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits [B, classes]."""
        return self.network(**{name: values for name, values in inputs.items() if name in self._takes}).logits


def pretrained(name: str, *, num_classes: int, vocabulary: int, padding: int, lora: int | None) -> nn.Module:
    """Load a classifier that `hf:PATH` names, with a new head where its folder has none for these classes.

    Args:
      name: `hf:` and the path of a folder with config.json and weights. Nothing is looked up on a network.
      num_classes: number of logits.
      vocabulary: number of the tokenizer's tokens, for all of which the network needs an embedding.
      padding: token that fills up texts; a causal network reads its answer at the last other one.
      lora: rank of the adapters, beside which only the head is trained; None: the network itself is trained.
    Raises: ModelError: a package is missing, the folder holds no network, or it does not fit.
    Privacy: sees no data.
    """
    folder = Path(name.removeprefix(HF_PREFIX)).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Expected model=hf:PATH to name a folder with config.json and weights; got model={name}. Networks are "
            "read from this machine alone. Save one there by save_pretrained(FOLDER) of transformers."
        )
    transformers = _transformers(name)
    try:
        with _quiet():
            network = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=num_classes, local_files_only=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # transformers raises many types; it has seen no data
        raise ModelError(
            f"Expected {folder} to hold a network that transformers makes a classifier of; got {quoted(error)}. "
            "Nothing can be trained. Save it there again, by save_pretrained(FOLDER)."
        ) from error
    network = network.float()
    config: Any = network.config
    known = network.get_input_embeddings().num_embeddings
    if vocabulary > known:
        raise ModelError(
            f"Expected a network with an embedding for each of the tokenizer's {vocabulary} tokens; got {known} in "
            f"model={name}. They do not belong together. Give --tokenizer the folder of the same network."
        )
    config.pad_token_id = padding
    return _called(network, lora, name)


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the configuration from which `rebuilt` builds a pretrained network; None for any other model.

    It has the network's architecture, and no folder. Privacy: reads no data.
    """
    if not isinstance(model, Pretrained):
        return None
    network: Any = model.network
    fields = json.loads(network.base_model.config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if not name.startswith("_")}  # _name_or_path is a folder


def rebuilt(config: Mapping[str, Any], *, lora: int | None, name: str) -> nn.Module:
    """Build a network as `pretrained` does, with weights that mean nothing yet.

    Args:
      config: of `config_of`.
      lora: rank of the adapters; None: there are none.
      name: of the model, for errors.
    Raises: ModelError: a package is missing, or transformers does not know the network.
    Privacy: sees no data.
    """
    transformers = _transformers(name)
    try:
        with _quiet():
            known = transformers.AutoConfig.for_model(**config)
            network = transformers.AutoModelForSequenceClassification.from_config(known)
    except Exception as error:
        raise ModelError(
            f"Expected a network that this version of transformers knows in model={name}; got {quoted(error)}. It "
            "cannot be built. Install the version that the run's record names, or a newer one."
        ) from error
    return _called(network.float(), lora, name)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"Expected the package transformers for model={name}; it is not installed. Install it by pip install "
            "'dpquant[text]'."
        ) from error
    return transformers


def _called(network: Any, lora: int | None, name: str) -> Pretrained:
    """Return a network of transformers as it is trained: with adapters, and called with the inputs that it takes."""
    takes = set(inspect.signature(network.forward).parameters)
    if getattr(network.config, "type_vocab_size", 0) < 2:  # no embedding for the second text of a pair
        takes.discard("token_type_ids")
    if lora is not None:
        network = _adapted(network, lora, name)
    return Pretrained(network, frozenset(takes))


def _adapted(network: Any, rank: int, name: str) -> nn.Module:
    """Freeze a network but for its head, and put adapters beside its attention projections."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"Expected the package peft for lora={rank}; it is not installed. Install it by pip install "
            "'dpquant[text]'."
        ) from error
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=rank, lora_alpha=_LORA_ALPHA * rank, lora_dropout=0.0)
    try:
        with _quiet():
            return peft.get_peft_model(network, config)
    except Exception as error:
        raise ModelError(
            f"Expected a network that peft knows where to adapt, with lora={rank}; got {quoted(error)} of "
            f"model={name}. Leave lora out, and name what is trained by --train-only."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context: transformers prints neither progress nor reports, which would stand among results."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def freeze_others(model: nn.Module, patterns: str) -> None:
    """Freeze all parameters whose names match none of some patterns.

    Args:
      model: is changed.
      patterns: as `*.classifier.*,*LayerNorm*`, with commas between them.
    Raises: ModelError: a pattern matches no parameter.
    """
    names = dict(model.named_parameters())
    wanted = [one.strip() for one in patterns.split(",") if one.strip()]
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise ModelError(
                f"Expected train_only={patterns} to match parameters; {pattern} matches none. "
                f"{did_you_mean(pattern, names)}Names are as {next(iter(names), 'none')}; * stands for anything."
            )
    for name, parameter in names.items():
        parameter.requires_grad_(parameter.requires_grad and any(fnmatch.fnmatchcase(name, one) for one in wanted))
