# SPDX-License-Identifier: Apache-2.0
"""Texts: a record's tokens, its padded length and its gradient follow from that record alone."""

import json

import pytest
import torch
from torch import nn

from dpquant.checks.synthetic import from_examples
from dpquant.data.columns import read_columns
from dpquant.data.pretrained import freeze_others
from dpquant.data.task import UNREADABLE
from dpquant.data.text_models import EmbeddingMean
from dpquant.data.texts import TextSource, buckets_to, load_texts, tokenizer_file
from dpquant.data.tokens import Texts, text_form
from dpquant.engine.clip import clipped_sum_of
from dpquant.engine.layers import prepare, set_policy
from dpquant.engine.passes import Objective
from dpquant.errors import DataError, ModelError
from dpquant.runs.evaluation import per_example_loss
from dpquant.training.records import Records
from words import VOCABULARY, tokenizer_in

CPU = torch.device("cpu")


def source(folder, lines, *, name="t.jsonl", test=None, share=None, max_length=80, **options):
    (folder / name).write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    if share is None:
        test = [{"text": "good day", "label": "ham"}] if test is None else test
        (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test))
    given = {"texts": "text", "label": "label", "classes": "ham,spam", **options}
    return TextSource.chosen(
        folder / name,
        **given,
        tokenizer=tokenizer_in(folder),
        max_length=max_length,
        test=None if share else folder / "test.jsonl",
        test_share=share,
    )


def words(count):
    return " ".join(["good", "bad", "day", "night"][i % 4] for i in range(count))


def record(count, label="ham"):
    return {"text": words(count), "label": label}


def test_tokens_are_padded_to_the_bucket_of_the_record_s_own_length(tmp_path):
    train, _, tokens = load_texts(source(tmp_path, [record(n) for n in (1, 14, 15, 62, 70, 500)]))
    assert tokens.buckets == (16, 32, 48, 64, 80) and tokens.vocabulary == len(VOCABULARY)
    lengths = [len(train[i][0]["input_ids"]) for i in range(6)]  # two more tokens begin and end a text
    assert lengths == [16, 16, 32, 64, 80, 80]
    inputs, target = train[0]
    assert inputs["input_ids"].tolist() == [VOCABULARY["[CLS]"], VOCABULARY["good"], VOCABULARY["[SEP]"]] + 13 * [0]
    assert inputs["attention_mask"].tolist() == 3 * [1] + 13 * [0] and target == 0
    assert train[5][0]["attention_mask"].sum() == 80 and train[5][0]["input_ids"][-1] == VOCABULARY["[SEP]"]
    assert train.dpquant_groups(torch.arange(6)).tolist() == [0, 0, 1, 3, 4, 4]
    assert train.dpquant_lengths == tokens.buckets


BROKEN = {
    "no JSON": "{text\n",
    "no object": "[1]\n",
    "no text": {"label": "ham"},
    "an empty text": {"text": "  ", "label": "ham"},
    "no label": {"text": "good"},
    "an unknown label": {"text": "good", "label": "eggs"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_cannot_be_used_stays_one_and_changes_no_other(name, tmp_path):
    train, _, _ = load_texts(source(tmp_path, [record(1), BROKEN[name], record(40, "spam")]))
    assert train.targets.tolist() == [0, UNREADABLE, 1] and train.readable.tolist() == [True, False, True]
    model = EmbeddingMean(len(VOCABULARY), 2)
    loss = per_example_loss(model, train.batch(torch.arange(3)))
    assert loss[0] > 0 and loss[1] == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss[1], list(model.parameters())))


def test_in_a_test_file_such_a_record_is_named_without_its_text(tmp_path):
    with pytest.raises(DataError, match=r"none of them in record 2") as raised:
        load_texts(source(tmp_path, [record(1)], test=[record(1), record(1, "eggs")]))
    assert "eggs" not in str(raised.value)


def test_snli_s_files_are_read_by_their_published_name(tmp_path):
    lines = [
        {"sentence1": "good day", "sentence2": "bad night", "gold_label": "entailment", "pairID": "1"},
        {"sentence1": "good", "sentence2": "bad", "gold_label": "-", "pairID": "2"},
        {"sentence1": "day", "sentence2": "good night", "gold_label": "contradiction", "pairID": "3"},
    ]
    options = {"texts": None, "label": None, "classes": None}
    train, test, _ = load_texts(source(tmp_path, lines, name="snli_1.0_train.jsonl", test=lines, **options))
    assert train.targets.tolist() == test.targets.tolist() == [0, 2]
    inputs, _ = train[0]
    cls, sep = VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]
    expected = [cls, VOCABULARY["good"], VOCABULARY["day"], sep, VOCABULARY["bad"], VOCABULARY["night"], sep]
    assert inputs["input_ids"][:7].tolist() == expected
    assert inputs["token_type_ids"][:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_other_separated_files(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    for name, text in {"t.csv": 'text,label\n"good, day",spam\n', "t.tsv": "label\ttext\nspam\tgood, day\n"}.items():
        (tmp_path / name).write_text(text)
        chosen = TextSource.chosen(
            tmp_path / name, texts="text", label="label", classes="ham,spam", tokenizer=tokenizer, max_length=16,
            test=tmp_path / name, test_share=None,
        )  # fmt: skip
        train, _, tokens = load_texts(chosen)
        assert tokens.buckets == (16,) and train.targets.tolist() == [1]
        assert train[0][0]["attention_mask"].sum() == 5


def clipped(records, ids, size=2):
    """The clipped sum of some records, all layers quantized: rounding follows the record's id, so that it repeats."""
    torch.manual_seed(0)
    model = prepare(EmbeddingMean(len(VOCABULARY), 2), format="int8", backend="simulate")
    set_policy(model, ["hidden", "output"])
    pieces = records.microbatches(torch.tensor(ids), size, 0)
    found = clipped_sum_of(Objective(model, per_example_loss), pieces, max_grad_norm=1.0, key=1)
    return torch.cat([grad.flatten() for grad in found.grads.values()])


def form_of(tokens, *, pairs):
    lengths, names = tokens.buckets, ("ham", "spam")
    return text_form(vocabulary=tokens.vocabulary, lengths=lengths, padding=0, class_names=names, pairs=pairs)


def records_of(data_set, tokens):
    made = form_of(tokens, pairs=False).synthetic
    specimens = from_examples(made, torch.utils.data.default_collate, CPU)
    return Records(data_set, torch.utils.data.default_collate, CPU, specimens)


class ToTheLongest:
    """The planted bug: the same records, each batch padded to its longest."""

    def __init__(self, texts: Texts):
        self._texts = texts

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, index):
        return self._texts[index]

    def dpquant_batch(self, ids):
        return self._texts.batch(ids)


def shapes(records, ids):
    """The shapes in which each record is read, by its id."""
    found = {}
    for piece in records.microbatches(torch.tensor(ids), 2, 0):
        for row in range(piece.num_examples):
            found[int(piece.record_ids[row])] = piece.data[0]["input_ids"][row].shape
    return found


def test_microbatches_hold_records_of_one_bucket_and_every_record_once(tmp_path):
    train, _, tokens = load_texts(source(tmp_path, [record(n) for n in (1, 70, 2, 40, 3, 71, 4)]))
    records = records_of(train, tokens)
    found = shapes(records, list(range(7)))
    assert found == {i: train[i][0]["input_ids"].shape for i in range(7)}
    assert list(records.microbatches(torch.tensor([], dtype=torch.int64), 2, 0)) == []


def test_buckets_are_finer_for_short_texts():
    assert buckets_to(512) == (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    assert buckets_to(16) == (16,) and buckets_to(40) == (16, 32, 40) and buckets_to(8) == (8,)


def test_a_long_companion_changes_no_record_s_shape(tmp_path):
    train, _, tokens = load_texts(source(tmp_path, [record(1), record(70)]))
    records = records_of(train, tokens)
    assert shapes(records, [0])[0] == shapes(records, [0, 1])[0]
    apart = clipped(records, [0]) + clipped(records, [1])
    torch.testing.assert_close(clipped(records, [0, 1]), apart, rtol=0, atol=1e-6)


def test_padding_to_the_longest_of_the_batch_would(tmp_path):
    """The twin, by which the test above is shown to see a length that others decide."""
    train, _, tokens = load_texts(source(tmp_path, [record(1), record(70)]))
    records = records_of(ToTheLongest(train), tokens)
    assert shapes(records, [0])[0] != shapes(records, [0, 1])[0]


def test_batchmates_of_a_short_record_are_cut_to_its_bucket(tmp_path):
    train, _, tokens = load_texts(source(tmp_path, [record(70), record(1)]))
    first, second = records_of(train, tokens).batchmates(torch.tensor([0, 1]), 3, 0)
    assert first.data[0]["input_ids"].shape == second.data[0]["input_ids"].shape == (3, 16)
    assert torch.equal(first.data[0]["input_ids"][0], second.data[0]["input_ids"][0])


def test_synthetic_texts_use_the_vocabulary_and_differ(tmp_path):
    _, _, tokens = load_texts(source(tmp_path, [record(1)]))
    made = form_of(tokens, pairs=True).synthetic
    assert made is not None
    assert all(inputs["input_ids"].max() < len(VOCABULARY) and len(inputs["input_ids"]) == 80 for inputs, _ in made)
    for name in made[1][0]:
        assert not torch.equal(made[1][0][name], made[2][0][name]), name
    assert [int(inputs["attention_mask"].sum()) for inputs, _ in made] == [60, 80, 40]


def test_all_parameters_but_those_that_match_are_frozen():
    model = EmbeddingMean(10, 2)
    freeze_others(model, "output.*, hidden.bias")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "hidden.bias",
        "output.weight",
        "output.bias",
    ]
    with pytest.raises(ModelError, match=r"outputs\.weight matches none\. Did you mean output\.weight"):
        freeze_others(EmbeddingMean(10, 2), "outputs.weight")


def test_padding_takes_no_part_in_a_mean_of_embeddings():
    model = EmbeddingMean(10, 2)
    short = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
    long = {"input_ids": torch.tensor([[1, 2, 7, 7]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert isinstance(model, nn.Module) and torch.equal(model(short), model(long))


CAUSES = {  # a test record that cannot be used: its line, the cause and the remedy
    "no text": ('{"text": "", "label": "ham"}', "an empty text", "take the record out"),
    "Latin-1": (b'{"text": "\xfc", "label": "ham"}', "not UTF-8", "iconv"),
    "another label": ('{"text": "good", "label": "eggs"}', "none of them", "--classes"),
    "no object": ("[1]", "cannot be read", "one JSON object"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_of_an_unusable_test_record_has_a_remedy_of_its_own(name, tmp_path):
    line, cause, remedy = CAUSES[name]
    chosen = source(tmp_path, [record(1)])
    with (tmp_path / "test.jsonl").open("ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError) as raised:
        load_texts(chosen)
    said = str(raised.value)
    assert f"{cause}" in said and "record 2" in said and remedy in said
    others = {remedy for _, _, remedy in CAUSES.values()} - {remedy}
    assert not any(other in said for other in others)


HEADED = "text,label\n"
FILES = {  # all of them hold the same two records
    "as it is": f"{HEADED}good day,ham\nbad night,spam\n".encode(),
    "with a mark": b"\xef\xbb\xbf" + f"{HEADED}good day,ham\nbad night,spam\n".encode(),
    "CRLF": f"{HEADED}good day,ham\nbad night,spam\n".replace("\n", "\r\n").encode(),
    "CR": f"{HEADED}good day,ham\nbad night,spam\n".replace("\n", "\r").encode(),
    "quoted line ends": b'text,label\n"good\n\nday",ham\n"bad\r\nnight",spam\n',
    "blank lines": f"{HEADED}\ngood day,ham\n\n\nbad night,spam\n\n".encode(),
    "no last line end": f"{HEADED}good day,ham\nbad night,spam".encode(),
    "blanks around names": b" text , label\ngood day,ham\nbad night, spam \n",
}


def read_csv(folder, content):
    (folder / "t.csv").write_bytes(content)
    chosen = TextSource.chosen(
        folder / "t.csv", texts="text", label="label", classes="ham,spam", tokenizer=tokenizer_in(folder),
        max_length=16, test=folder / "t.csv", test_share=None,
    )  # fmt: skip
    return load_texts(chosen)[0]


@pytest.mark.parametrize("name", FILES)
def test_ends_of_lines_marks_and_quotes_change_no_record(name, tmp_path):
    plain, found = read_csv(tmp_path, FILES["as it is"]), read_csv(tmp_path, FILES[name])
    assert found.targets.tolist() == plain.targets.tolist() == [0, 1]
    assert all(torch.equal(found[i][0]["input_ids"], plain[i][0]["input_ids"]) for i in range(2))


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_codings_are_named(coding, tmp_path):
    with pytest.raises(DataError, match="UTF-16"):
        read_csv(tmp_path, FILES["as it is"].decode().encode(coding))


def test_a_record_in_another_coding_decides_nothing_about_the_others_whatever_ends_a_line(tmp_path):
    for end in (b"\n", b"\r", b"\r\n"):
        (tmp_path / "test.csv").write_bytes(FILES["as it is"])
        (tmp_path / "t.csv").write_bytes(end.join([b"text,label", b"b\xe4d,ham", b"good,ham"]))
        chosen = TextSource.chosen(
            tmp_path / "t.csv", texts="text", label="label", classes="ham,spam", tokenizer=tokenizer_in(tmp_path),
            max_length=16, test=tmp_path / "test.csv", test_share=None,
        )  # fmt: skip
        assert load_texts(chosen)[0].targets.tolist()[1] == 0


def test_bytes_of_a_parquet_record_that_are_not_utf8_decide_nothing_about_the_others(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"b\xe4d", b"good", None], pyarrow.binary()).view(pyarrow.string())
    labels = pyarrow.array(["ham", "ham", "spam"])
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": raw, "label": labels}), tmp_path / "t.parquet")
    found = read_columns(tmp_path / "t.parquet", None, [".parquet"]).values["text"]
    assert found == ["b\N{REPLACEMENT CHARACTER}d", "good", None]


def test_where_no_tokenizer_is_the_error_names_a_way_without_a_network(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"without a network, by Tokenizer\.train"):
            tokenizer_file(place)
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.json"
