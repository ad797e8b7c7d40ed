# SPDX-License-Identifier: Apache-2.0
"""A pretrained network is refused, in a line with the way out, where it does not fit texts, tokenizer or weights."""

import dataclasses
import json
import warnings

import pytest

from dpquant.data.pretrained import pretrained
from dpquant.data.texts import TextSource, Tokens, form_of_texts
from dpquant.data.tokens import text_form
from dpquant.errors import ModelError
from words import VOCABULARY, bert_in, tokenizer_in

FORM = text_form(vocabulary=len(VOCABULARY), lengths=(16, 64), padding=0, class_names=("ham", "spam"), pairs=False)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return bert_in(tmp_path_factory.mktemp("network"))


def load(network, form=FORM):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pretrained(f"hf:{network}", form, lora=None)


def longer(form, tokens):
    return dataclasses.replace(form, input_shape=(tokens,))


def tokens_of(folder, *, changed=None):
    """The form of texts of a tokenizer, with one word in another one's place."""
    file = tokenizer_in(folder) / "tokenizer.json"
    if changed is not None:
        file.write_text(file.read_text().replace(f'"{changed}"', '"other"'))
    return dataclasses.replace(FORM, tokenizer=file.read_bytes())


def test_one_that_fits_is_loaded(network, tmp_path):
    assert load(network) is not None
    tokenizer_in(network)
    assert load(network, tokens_of(tmp_path / "same")) is not None


def test_texts_longer_than_its_positions_are_refused_with_the_largest_length(network):
    with pytest.raises(ModelError, match=r"max_length of at most 64.*got max_length=65.*--max-length 64"):
        load(network, longer(FORM, 65))


def test_positions_that_begin_after_the_padding_are_counted(tmp_path):
    """RoBERTa's first position is that after the index of padding."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    assert load(tmp_path, longer(FORM, 32)) is not None
    with pytest.raises(ModelError, match="--max-length 32"):
        load(tmp_path, longer(FORM, 33))


def test_a_tokenizer_with_other_tokens_than_the_one_beside_the_network_is_refused(network, tmp_path):
    tokenizer_in(network)
    with pytest.raises(ModelError, match="other tokens"):
        load(network, tokens_of(tmp_path / "changed", changed="night"))


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(network):
    with pytest.raises(ModelError, match="each of the tokenizer's 10 tokens; got 9"):
        load(network, dataclasses.replace(FORM, vocabulary=10))


def test_texts_without_a_token_that_pads_are_refused(network):
    with pytest.raises(ModelError, match="a token that pads"):
        load(network, dataclasses.replace(FORM, padding=None))


def test_weights_of_another_network_are_refused(network, tmp_path):
    """transformers would fill the network with random numbers."""
    bert_in(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8}))
    with pytest.raises(ModelError, match="lacks"):
        load(tmp_path)


def test_a_head_for_other_classes_begins_anew_and_that_is_said(network):
    form = dataclasses.replace(FORM, num_classes=5)
    with pytest.warns(UserWarning, match="tells 2 classes apart, and yours are 5"):
        pretrained(f"hf:{network}", form, lora=None)


@pytest.mark.parametrize(("token", "pads"), [("[PAD]", True), ("<|endoftext|>", True), ("word", False)])
def test_a_tokenizer_s_padding_is_known_by_name_or_not_at_all(token, pads, tmp_path):
    file = tokenizer_in(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace("[PAD]", token))
    tokens = Tokens.read(file, 16)
    source = TextSource.chosen(
        tmp_path / "t.csv",
        texts="t",
        label="y",
        classes="a,b",
        tokenizer=file,
        max_length=16,
        test=None,
        test_share=0.1,
    )
    assert tokens.pads == pads and form_of_texts(source, tokens).padding == (0 if pads else None)
