# SPDX-License-Identifier: Apache-2.0
"""Tables: a row is encoded as its spec says and by nothing else; a row that is not as it says stays a record."""

import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from dpquant.data import columns
from dpquant.data.columns import read_columns
from dpquant.data.draft import drafted
from dpquant.data.held import is_for_test
from dpquant.data.models import build
from dpquant.data.rows import synthetic_rows
from dpquant.data.spec import Spec
from dpquant.data.tables import SUFFIXES, TableSource, load_table
from dpquant.data.task import UNREADABLE
from dpquant.errors import DataError
from sources import SPEC

WIDER = (
    SPEC
    + """
[columns.balance]
kind = "number"
range = [-10, 990]
scale = "log"
missing = ["", "NA"]

[columns.channel]
kind = "category"
values = ["web"]
other = false
missing = [""]

[columns.id]
kind = "ignored"
"""
)
HEADER = "id,amount,balance,country,channel,fraud\n"
ROWS = ["a,50,89,AT,web,no", "b,1000,NA,IT,,yes", "c,-3,-10,DE,web,no"]
ENCODED = [  # amount, balance, whether balance is missing, country (IT: other), channel (missing)
    [0.0, 2 * math.log1p(99) / math.log1p(1000) - 1, 0, 0, 0],
    [1.0, 0.0, 1, 2, 1],
    [-1.0, -1.0, 0, 1, 0],
]


def spec_of(text: str, folder: Path) -> Spec:
    (folder / "spec.toml").write_text(text)
    return Spec.read(folder / "spec.toml")


def write(path: Path, rows) -> None:
    path.write_bytes(
        b"".join(
            line if isinstance(line, bytes) else line.encode()
            for row in (HEADER.strip(), *rows)
            for line in (row, "\n")
        )
    )


def loaded(folder: Path, rows, *, test=ROWS[:2], share=None, spec=WIDER, name="t.csv"):
    if name == "t.csv":
        write(folder / name, rows)
    write(folder / "test.csv", test)
    source = TableSource(
        path=folder / name,
        label="fraud",
        spec=spec_of(spec, folder),
        test=None if share else folder / "test.csv",
        test_share=share,
    )
    return load_table(source)


def test_a_row_is_encoded_as_the_spec_says(tmp_path):
    train, test = loaded(tmp_path, ROWS)
    torch.testing.assert_close(train.inputs, torch.tensor(ENCODED))
    assert train.targets.tolist() == [0, 1, 0] and train.readable.all()
    assert torch.equal(test.inputs, train.inputs[:2])
    inputs, targets = train.dpquant_batch(torch.tensor([2, 0]))
    assert torch.equal(inputs, train.inputs[[2, 0]]) and targets.tolist() == [0, 0]
    assert torch.equal(train[1][0], inputs.new_tensor(ENCODED[1]))


BROKEN = {
    "a word for a number": "d,much,1,AT,web,no",
    "an infinite number": "d,inf,1,AT,web,no",
    "a missing value that is not declared": "d,,1,AT,web,no",
    "an unknown category without other": "d,1,1,AT,post,no",
    "an unknown class": "d,1,1,AT,web,perhaps",
    "a field too few": "d,1,1,AT,web",
    "a field too many": "d,1,1,AT,web,no,no",
    "bytes that are no UTF-8": b"d,1,1,\xff,web,no",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_not_as_the_spec_says_stays_a_record_and_changes_no_other(name, tmp_path):
    whole, _ = loaded(tmp_path, ROWS)
    train, _ = loaded(tmp_path, [ROWS[0], BROKEN[name], *ROWS[1:]])
    assert train.targets.tolist() == [0, UNREADABLE, 1, 0] and train.readable.tolist() == [True, False, True, True]
    assert torch.equal(train.inputs[[0, 2, 3]], whole.inputs) and not train.inputs[1].any()


@pytest.mark.parametrize("name", BROKEN)
def test_in_a_test_file_the_first_such_row_is_named_without_its_values(name, tmp_path):
    with pytest.raises(DataError, match="record 2") as raised:
        loaded(tmp_path, ROWS, test=[ROWS[0], BROKEN[name]])
    assert not any(value in str(raised.value) for value in ("much", "post", "perhaps", "inf,"))


def test_a_table_without_a_row_as_the_spec_says_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one record"):
        loaded(tmp_path, [BROKEN["a word for a number"]])


def test_a_regression_s_targets_are_clamped_and_scaled(tmp_path):
    spec = WIDER.replace(
        'task = "rare positives"\nclasses = ["no", "yes"]\nprior = 0.25', 'task = "regression"\nrange = [0, 10]'
    )
    rows = [f"a,1,1,AT,web,{label}" for label in ("5", "40", "-2", "nan", "no")]
    train, _ = loaded(tmp_path, rows, spec=spec, test=["a,1,1,AT,web,10"])
    assert train.targets.dtype == torch.float32
    np.testing.assert_array_equal(train.targets.numpy(), np.array([0, 1, -1, np.nan, np.nan], dtype=np.float32))


def test_parquet_holds_the_same_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "id": ["a", "b", "c"],
            "amount": [50, 1000, -3],
            "balance": [89.0, None, -10.0],
            "country": ["AT", "IT", "DE"],
            "channel": ["web", None, "web"],
            "fraud": ["no", "yes", "no"],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    train, _ = loaded(tmp_path, (), name="t.parquet")
    torch.testing.assert_close(train.inputs, torch.tensor(ENCODED))
    assert train.targets.tolist() == [0, 1, 0]


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as Python marks what cannot be imported
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'dpquant\[arrow\]'"):
        read_columns(tmp_path / "t.parquet", None, SUFFIXES)


def records(count, seed=0):
    random = np.random.default_rng(seed)
    numbers, words = random.integers(100, size=(count, 2)), random.integers(2, size=(count, 2))
    return [
        f"r{i},{a},{b},{('AT', 'DE')[c]},web,{('no', 'yes')[d]}"
        for i, ((a, b), (c, d)) in enumerate(zip(numbers, words, strict=True))
    ]


def rows_of(split):
    return sorted(map(tuple, torch.cat([split.inputs, split.targets[:, None]], 1).tolist()))


def test_a_record_moves_no_other_between_training_and_test(tmp_path):
    rows = records(200)
    train, test = loaded(tmp_path, rows, share=0.3)
    assert 30 < len(test) < 90 and len(train) + len(test) == 200
    without_train, without_test = loaded(tmp_path, rows[1:], share=0.3)
    gone = len(train) + len(test) - len(without_train) - len(without_test)
    assert gone == 1
    assert set(rows_of(without_train)) <= set(rows_of(train)) and set(rows_of(without_test)) <= set(rows_of(test))


def test_a_split_by_place_would_move_others():
    """The twin: with every third record for test, removing the first moves most of the others."""
    rows = records(30)
    by_place = set(rows[1::3]) - set(rows[0::3])
    by_content = {row for row in rows[1:] if is_for_test((row,), 0.3)} - {r for r in rows if is_for_test((r,), 0.3)}
    assert len(by_place) > 5 and not by_content


def test_the_draft_of_a_spec_is_refused_until_it_is_no_draft(tmp_path):
    (tmp_path / "t.csv").write_text(HEADER + "\n".join(records(100)) + "\n")
    draft = drafted(tmp_path / "t.csv", "fraud")
    with pytest.raises(DataError, match="draft"):
        spec_of(draft, tmp_path)
    spec = spec_of(draft.replace("draft = true\n", ""), tmp_path)
    assert spec.classes == ("no", "yes") and set(spec.numbers) == {"amount", "balance"}
    assert spec.categories["country"].values == ("AT", "DE") and spec.columns["id"] is None
    assert all("(read)" in line for line in draft.splitlines() if line.startswith(("range", "values", "classes")))


def test_a_draft_takes_the_rarer_of_two_classes_for_a_rare_positive(tmp_path):
    for often, rare in (("a", "b"), ("b", "a")):
        (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{n % 7},{often if n % 25 else rare}\n" for n in range(100)))
        spec = spec_of(drafted(tmp_path / "t.csv", "y").replace("draft = true\n", ""), tmp_path)
        assert (spec.task.kind, spec.classes, spec.task.prior) == ("rare positives", (often, rare), 0.04)
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{n % 7},{'ab'[n % 4 == 0]}\n" for n in range(100)))
    assert tomllib.loads(drafted(tmp_path / "t.csv", "y"))["task"] == "classification"


def test_a_draft_scales_numbers_near_the_smallest_by_a_logarithm(tmp_path):
    (tmp_path / "t.csv").write_text(
        "near,even,y\n" + "".join(f"{(n // 2) ** 3},{n // 2},{n % 2}\n" for n in range(100))
    )
    columns = tomllib.loads(drafted(tmp_path / "t.csv", "y"))["columns"]
    assert columns["near"]["scale"] == "log" and "scale" not in columns["even"]


def test_the_draft_of_a_regression(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{i % 3},{i / 7}\n" for i in range(100)))
    spec = spec_of(drafted(tmp_path / "t.csv", "y").replace("draft = true\n", ""), tmp_path)
    assert spec.task.kind == "regression" and spec.task.high == 99 / 7


@pytest.mark.parametrize("name", ["mlp", "tabular-resnet"])
def test_a_network_for_tables_embeds_each_category_s_codes(name, tmp_path):
    spec = spec_of(WIDER, tmp_path)
    sizes = [category.size for category in spec.categories.values()]
    assert sizes == [3, 2]
    model = build(name, num_classes=2, input_shape=(spec.width,), categories=sizes)
    inputs = torch.tensor(ENCODED)
    logits = model(inputs)
    assert logits.shape == (3, 2)
    table = model[0].embedding.weight
    by_hand = [torch.cat([row[:3], table[int(row[3])], table[3 + int(row[4])]]) for row in inputs]
    assert torch.equal(model[1:](torch.stack(by_hand)), logits)
    assert torch.equal(
        model(inputs + torch.tensor([0, 0, 0, 99, 99.0])),
        model(torch.where(torch.arange(5) < 3, inputs, torch.tensor([0, 0, 0, 2, 1.0]))),
    )


def test_synthetic_rows_are_in_the_spec_s_domain(tmp_path):
    spec = spec_of(WIDER, tmp_path)
    rows = torch.stack([inputs for inputs, _ in synthetic_rows(spec)])
    assert rows[:, :2].abs().max() <= 1 and set(rows[:, 2].tolist()) <= {0, 1}
    assert all(set(rows[:, place].tolist()) <= set(range(size)) for place, size in ((3, 3), (4, 2)))
    assert not torch.equal(rows[1], rows[2])


def test_long_fields_are_read(tmp_path):
    (tmp_path / "t.csv").write_text("a\n" + "x" * 200_000 + "\n")
    assert len(read_columns(tmp_path / "t.csv", None, SUFFIXES).values["a"][0]) == 200_000


def test_names_are_checked_where_columns_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="a twice"):
        columns.read_columns(tmp_path / "t.csv", None, SUFFIXES)


def drafted_kinds(folder, header, lines):
    (folder / "t.csv").write_text(f"{header},y\n" + "".join(f"{line},{n % 2}\n" for n, line in enumerate(lines)))
    draft = drafted(folder / "t.csv", "y")
    columns = tomllib.loads(draft)["columns"]
    return {name: column["kind"] for name, column in columns.items()}, draft


IDENTIFIERS = ("id", "ID", "customer_id", "customerId", "customerID", "uuid", "e-mail", "Email", "user_email", "name")
NONE = ("idle", "paid", "grid", "valid_until", "amount", "country_name", "midday")


def test_a_column_that_looks_like_an_identifier_is_ignored_in_a_draft_and_said_why(tmp_path):
    for name in IDENTIFIERS:
        kinds, draft = drafted_kinds(tmp_path, name, [5, 5, 7, 8])
        assert kinds == {name: "ignored"} and "identifier" in draft and "# range = [5.0, 8.0]" in draft
    kinds, draft = drafted_kinds(tmp_path, "account,amount", [f"{90 - n},{n + 0.5}" for n in range(30)])
    assert kinds == {"account": "ignored", "amount": "number"} and "a value of its own" in draft


def test_a_column_that_only_sounds_like_an_identifier_is_not_taken_for_one(tmp_path):
    """Twin of the test above: neither a part of a word nor values that repeat make an identifier."""
    for name in NONE:
        assert drafted_kinds(tmp_path, name, [5, 5, 7, 8])[0] == {name: "number"}
    assert drafted_kinds(tmp_path, "account", [*range(30), 0])[0] == {"account": "number"}


def test_a_draft_knows_dates_and_words_for_a_missing_value_among_numbers(tmp_path):
    lines = [
        f"{('NA', '1.5', 'n/a', '')[n % 4] or ''},2024-01-{1 + n % 28:02d} 12:00,{('NA', 'a')[n % 2]}"
        for n in range(40)
    ]
    kinds, draft = drafted_kinds(tmp_path, "income,seen,grade", lines)
    assert kinds == {"income": "number", "seen": "date", "grade": "category"}
    columns = tomllib.loads(draft)["columns"]
    assert columns["income"]["missing"] == ["", "NA", "n/a"] and columns["grade"]["values"] == ["NA", "a"]
    assert columns["seen"]["range"] == ["2024-01-01 12:00", "2024-01-28 12:00"]
    assert spec_of(draft.replace("draft = true\n", ""), tmp_path).numbers["seen"].date


DATES = """
task = "classification"
classes = ["no", "yes"]

[columns.seen]
kind = "date"
range = [2024-01-01, 2024-01-11]
missing = [""]
"""


def dated(folder, values):
    """The inputs of a table of dates, and which of its records can be used."""
    lines = "".join(f"{value},no\n" for value in values)
    for name in ("t.csv", "test.csv"):
        (folder / name).write_text("seen,fraud\n" + (lines if name == "t.csv" else "2024-01-01,no\n"))
    spec = spec_of(DATES, folder)
    source = TableSource(path=folder / "t.csv", label="fraud", spec=spec, test=folder / "test.csv", test_share=None)
    rows, _ = load_table(source)
    return rows.inputs.tolist(), rows.readable.tolist()


def test_a_date_is_scaled_by_its_range_and_what_is_no_date_stays_a_record(tmp_path):
    days = ["2024-01-06", "2024-01-11T00:00", "1999-12-31", "2024-01-06 12:00:00", "2024-01-06T02:00+02:00", ""]
    inputs, readable = dated(tmp_path, days)
    assert inputs == [[0, 0], [1, 0], [-1, 0], [pytest.approx(0.1), 0], [0, 0], [0, 1]] and all(readable)
    broken = ["soon", "2024-13-01", "0001-01-01T00:00+23:59", "9999-12-31T23:59-23:59", "2024-01-0\u0661", "1704067200"]
    inputs, readable = dated(tmp_path, [*broken, "2024-01-06"])
    assert inputs == [[0, 0]] * 7 and readable == [False] * 6 + [True]


@pytest.mark.parametrize("wrong", ["[2024-01-11, 2024-01-01]", "[1, 2]", '["soon", "later"]', "[2024-01-01]"])
def test_a_range_of_dates_that_is_none_is_refused(wrong, tmp_path):
    with pytest.raises(DataError, match="two dates in ISO 8601"):
        spec_of(DATES.replace("[2024-01-01, 2024-01-11]", wrong), tmp_path)


def test_a_draft_says_that_a_label_of_one_class_leaves_nothing_to_tell(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n1,yes\n2,yes\n")
    assert "single value" in drafted(tmp_path / "t.csv", "y")
    (tmp_path / "t.csv").write_text("x,y\n1,yes\n2,no\n")
    assert "single value" not in drafted(tmp_path / "t.csv", "y")


EMPTY = {
    "another value": ("a,50,89,AT,shop,no", "column channel", "other"),
    "too few fields": ("a,50,89", "too few or too many fields", "as many fields as the header"),
    "not UTF-8": (b"a,50,89,AT,w\xe9b,no", "not UTF-8", "iconv"),
    "an empty value": ("a,,89,AT,web,no", "empty value in column amount", 'missing = [""]'),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_test_row_that_cannot_be_used_is_refused_for_its_own_cause(kind, tmp_path):
    row, cause, remedy = EMPTY[kind]
    with pytest.raises(DataError, match="record 2") as raised:
        loaded(tmp_path, ROWS, test=[ROWS[0], row])
    assert cause in str(raised.value) and remedy in str(raised.value)
