#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write SYNTHETIC mails, half of them spam: train.csv, test.csv and tokenizer.json, a tokenizer of their public words.

python examples/texts/make.py FOLDER [--records 3000] [--seed 0]

No mail is real: words are drawn by the made-up rules in `mail`.
"""

import argparse
import csv
import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HAM = [
    "agenda", "budget", "coffee", "deadline", "draft", "friday", "invoice", "lunch", "meeting", "minutes",
    "monday", "notes", "office", "project", "report", "review",
]  # fmt: skip
SPAM = [
    "bonus", "cash", "cheap", "click", "credit", "diet", "free", "loan", "lottery", "miracle", "offer", "pills",
    "prize", "rich", "urgent", "winner",
]  # fmt: skip
COMMON = [
    "a", "about", "and", "for", "from", "has", "in", "is", "it", "now", "of", "on", "our", "please", "the",
    "this", "to", "today", "we", "with", "you", "your",
]  # fmt: skip
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def mail(draw: random.Random) -> tuple[str, str]:
    """Return a text and its kind. Most words are common to both kinds, and each kind borrows some of the other's."""
    kind, own, other = ("spam", SPAM, HAM) if draw.random() < 0.5 else ("ham", HAM, SPAM)
    words = [draw.choice(draw.choices((COMMON, own, other), (60, 28, 12))[0]) for _ in range(draw.randint(4, 40))]
    return " ".join(words), kind


def tokenizer() -> Tokenizer:
    """Return a tokenizer of whole words."""
    words = (*SPECIAL, *COMMON, *HAM, *SPAM)
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


def write(path: Path, count: int, draw: random.Random) -> None:
    """Write mails to a file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("body", "kind"))
        writer.writerows(mail(draw) for _ in range(count))


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=3000, help="of train.csv; test.csv has a fifth of it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(given.seed)
    write(given.folder / "train.csv", given.records, draw)
    write(given.folder / "test.csv", given.records // 5, draw)
    tokenizer().save(str(given.folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
