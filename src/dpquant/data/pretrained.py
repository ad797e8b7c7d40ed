# SPDX-License-Identifier: Apache-2.0
"""Pretrained networks for texts, from a folder of this machine, whole or by LoRA, and which parameters are trained.

A network takes the inputs of a batch, {"input_ids", "attention_mask" and, of pairs, "token_type_ids"}: int64
[B, tokens], and returns [B, classes].
"""

import contextlib
import fnmatch
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpquant.data.form import Form
from dpquant.data.model_names import pretrained_folder
from dpquant.data.texts import buckets_to
from dpquant.data.tokens import text_form
from dpquant.errors import ModelError, SettingError, did_you_mean, quoted

_USUAL_LENGTH = 128  # tokens of a text, where nothing else says how many
_LORA_ALPHA = 2  # times the rank: the update's factor


class Pretrained(nn.Module):
    """A classifier of transformers, called with the inputs that it takes, and returning its logits alone."""

    def __init__(self, network: nn.Module, takes: frozenset[str]) -> None:
        super().__init__()
        self.network, self._takes = network, takes

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits [B, classes]."""
        return self.network(**{name: values for name, values in inputs.items() if name in self._takes}).logits


def pretrained(name: str, form: Form, *, lora: int | None) -> nn.Module:
    """Load a classifier that `hf:PATH` names, with a new head where its folder has none for these classes.

    Args:
      name: `hf:` and the path of a folder with config.json and weights. Nothing is looked up on a network.
      form: of texts: the network needs an embedding for each token, and for each position where it has such. A causal
        network reads its answer at the last token that does not pad.
      lora: rank of the adapters, beside which only the head is trained; None: the network itself is trained.
    Raises: ModelError: a package is missing, the folder holds no network, or it does not fit.
    Warns: of a head that begins anew although the folder has one, for another number of classes.
    Privacy: sees no data.
    """
    folder = pretrained_folder(name)
    transformers = _transformers(name)
    _check_tokenizer(folder, form.tokenizer)
    try:
        with _quiet():
            network, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=form.num_classes,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types; it has seen no data
        raise ModelError(
            f"Expected {folder} to hold a network that transformers makes a classifier of; got {quoted(error)}. "
            "Nothing can be trained. Save it there again, by save_pretrained(FOLDER)."
        ) from error
    network = network.float()
    _check_weights(network, loaded, name, form)
    _check_fits(network, name, form)
    network.config.pad_token_id = form.padding
    return _called(network, lora, name)


def made_up_form(name: str, *, vocabulary: int | None, tokens: int | None, class_names: Sequence[str]) -> Form:
    """Return the form of texts on which a pretrained network can be tried without a tokenizer.

    Args:
      name: as for `pretrained`.
      vocabulary: number of tokens; None: of the network's own, by its config.json.
      tokens: length of a text; None: 128, or as many as the network has positions for.
      class_names: in the order of the targets.
    Raises: ModelError: the folder holds no network.
      SettingError: the number of tokens is not known.
    """
    file = pretrained_folder(name) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known, positions = config.get("vocab_size"), config.get("max_position_embeddings", _USUAL_LENGTH)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"Expected config.json of model={name} to describe a network; got {type(error).__name__}. Save it there "
            "again, by save_pretrained(FOLDER)."
        ) from error
    if vocabulary is None and not isinstance(known, int):
        raise SettingError(
            f"Expected vocabulary for model={name}, whose config.json has no vocab_size; got none. Give --vocabulary."
        )
    return text_form(
        vocabulary=vocabulary or known,
        lengths=buckets_to(tokens or min(_USUAL_LENGTH, positions)),
        padding=config.get("pad_token_id") or 0,
        class_names=class_names,
        pairs=False,
    )


def _check_tokenizer(folder: Path, content: bytes | None) -> None:
    """Refuse a tokenizer with other tokens than the one that lies beside the network, if there is one."""
    beside = folder / "tokenizer.json"
    if content is None or not beside.is_file():
        return
    own, given = _tokens_of(beside.read_bytes()), _tokens_of(content)
    if own is not None and own != given:
        raise ModelError(
            f"Expected the tokenizer of the network in {folder}; got one with other tokens. The network would read "
            f"other words than it has learned. Give --tokenizer {folder}."
        )


def _tokens_of(content: bytes) -> Any:
    """Return the tokens in a tokenizer's file, in its own form; None if it has none that can be read."""
    try:
        return json.loads(content)["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return None


def _check_weights(network: Any, loaded: Mapping[str, Any], name: str, form: Form) -> None:
    """Refuse a folder whose weights are of another network; warn of a head that begins anew although there is one."""
    missing, own = set(loaded["missing_keys"]), dict(network.named_parameters())
    body = [key for key in own if key.startswith(f"{network.base_model_prefix}.")]
    lacking = sorted(missing.intersection(body))
    if 2 * len(lacking) > len(body):
        raise ModelError(
            f"Expected weights for the network that config.json describes; got a folder that lacks {len(lacking)} of "
            f"its {len(body)} tensors, as {lacking[0]}, in model={name}. They would be random. Save the network there "
            "again, by save_pretrained(FOLDER)."
        )
    if loaded["mismatched_keys"]:
        heads = {next(iter(was), 1) for _, was, now in loaded["mismatched_keys"] if was != now}
        warnings.warn(
            f"The head of model={name} begins anew: it tells {min(heads, default=0)} classes apart, and yours are "
            f"{form.num_classes}. The rest is taken as it was trained.",
            stacklevel=2,
        )


def _check_fits(network: Any, name: str, form: Form) -> None:
    """Refuse a network without an embedding for each token or position, and texts without a token that pads."""
    known, vocabulary = network.get_input_embeddings().num_embeddings, form.vocabulary or 0
    if vocabulary > known:
        raise ModelError(
            f"Expected a network with an embedding for each of the tokenizer's {vocabulary} tokens; got {known} in "
            f"model={name}. They do not belong together. Give --tokenizer the folder of the same network."
        )
    positions, longest = _positions(network), form.input_shape[0]
    if positions is not None and longest > positions:
        raise ModelError(
            f"Expected max_length of at most {positions}, the positions that model={name} knows; got "
            f"max_length={longest}. It has no embedding for later ones. Give --max-length {positions}."
        )
    if form.padding is None:
        raise ModelError(
            f"Expected a tokenizer with a token that pads, for model={name}; got one without. The network would take "
            "the padding for words. Add one, by tokenizer.add_special_tokens({'pad_token': '<pad>'}), and save it "
            "again."
        )


def _positions(network: Any) -> int | None:
    """Return for how many positions a network has embeddings; None if it computes them."""
    tables = (
        module
        for path, module in network.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in (last := path.rpartition(".")[2]) or last == "wpe")
    )
    return min(map(_places, tables), default=None)


def _places(table: nn.Embedding) -> int:
    """Return the positions that a table has embeddings for: some begin after the index of padding, or at an offset."""
    first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - first


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
            below = any(name.startswith(f"{pattern}.") for name in names)
            meant = f"Did you mean {pattern}.*? " if below else did_you_mean(pattern, names)
            raise ModelError(
                f"Expected train_only={patterns} to match parameters; {pattern} matches none. {meant}Names are as "
                f"{next(iter(names), 'none')}; * stands for anything."
            )
    for name, parameter in names.items():
        parameter.requires_grad_(parameter.requires_grad and any(fnmatch.fnmatchcase(name, one) for one in wanted))
