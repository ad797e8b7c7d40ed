# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of a few words, and pretrained networks of its size, made where they are needed."""

from pathlib import Path

WORDS = ("good", "bad", "day", "night", ",")
VOCABULARY = {name: place for place, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}


def tokenizer_in(folder: Path) -> Path:
    """Write a tokenizer into a folder, as transformers saves one, and return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]")],
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bert_in(folder: Path) -> Path:
    """Write a tiny BERT into a folder, with random weights, and return the folder."""
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=0.3,  # with 0.02 the attention of so small a network has no effect that can be seen
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
