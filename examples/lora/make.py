#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write a small BERT with RANDOM weights, in place of a pretrained one, as transformers saves it.

python examples/lora/make.py FOLDER --tokenizer FOLDER [--seed 0]
"""

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification


def main() -> None:
    """Write configuration, weights and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    words = Tokenizer.from_file(str(given.tokenizer / "tokenizer.json")).get_vocab_size()
    config = BertConfig(
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.1,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(given.folder)
    shutil.copy(given.tokenizer / "tokenizer.json", given.folder)


if __name__ == "__main__":
    main()
