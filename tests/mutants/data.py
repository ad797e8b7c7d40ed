# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in `data`: what a record, or another one, decides where only public knowledge may."""

from mutants.mutant import COUPLING, LEAK, RESUME, mutants_of

_DATA = "src/dpquant/data"
_TABLES, _TEXTS = "tests/data/test_tables.py", "tests/data/test_texts.py"

MUTANTS = [
    *mutants_of(
        f"{_DATA}/values.py",
        _TABLES,
        (
            "a date that leads out of all years ends the run, and so is reported",
            LEAK,
            "(ValueError, OverflowError)",
            "ValueError",
        ),
    ),
    *mutants_of(
        f"{_DATA}/tables.py",
        _TABLES,
        (
            "a row that cannot be used is refused and so reported",
            LEAK,
            "_usable(_rows(source, columns), source.path), test",
            "_usable(_rows(source, columns, strict=True), source.path), test",
        ),
        (
            "a row that cannot be used is trained on",
            LEAK,
            "    targets[~readable] = nothing\n",
            "",
        ),
        (
            "the error for a test record quotes it",
            LEAK,
            'f"another value in column {name}"',
            'f"{value} in column {name}"',
        ),
        (
            "categories are taken from the records",
            COUPLING,
            "enumerate(column.values)}",
            "enumerate(sorted(set(map(text_of, values))))}",
        ),
    ),
    *mutants_of(
        f"{_DATA}/spec.py",
        _TABLES,
        (
            "what is no date is read as a number of days",
            LEAK,
            "days_of(text) if self.date else number_of(text)",
            "days_of(text) or number_of(text)",
        ),
        ("a draft of a spec is accepted", LEAK, 'if found.get("draft"):', "if False:"),
        (
            "numbers are not clamped to the public range",
            COUPLING,
            "above = min(max(value, self.low), self.high) - self.low",
            "above = max(value, self.low) - self.low",
        ),
    ),
    *mutants_of(
        f"{_DATA}/held.py",
        _TABLES,
        (
            "whether a record is for test follows from how often it was asked",
            COUPLING,
            '    digest = hashlib.sha256(f"dpquant test {content}".encode',
            '    is_for_test.__dict__["n"] = is_for_test.__dict__.get("n", 0) + 1\n'
            '    content = str(is_for_test.__dict__["n"])\n'
            '    digest = hashlib.sha256(f"dpquant test {content}".encode',
        ),
    ),
    *mutants_of(
        f"{_DATA}/texts.py",
        _TEXTS,
        (
            "a text with an unknown label is trained on",
            LEAK,
            "codes.get(label, UNREADABLE) if",
            "codes.get(label, 0) if",
        ),
    ),
    *mutants_of(
        f"{_DATA}/columns.py",
        _TEXTS,
        (
            "bytes of one Parquet record decide whether the file is read",
            LEAK,
            'value.decode(errors="replace")',
            "value.decode()",
        ),
        (
            "a record in another coding decides whether a file with bare carriage returns is read",
            LEAK,
            '.split(b"\\r")[0]',
            "",
        ),
    ),
    *mutants_of(
        f"{_DATA}/folders.py",
        "tests/data/test_dataset.py",
        (
            "a training image that cannot be read is refused, and so reported",
            LEAK,
            "    check_readable(files, test)\n",
            "    check_readable(files, test)\n    check_readable([folder] * len(train), train)\n",
        ),
    ),
    *mutants_of(
        f"{_DATA}/tokens.py",
        _TEXTS,
        (
            "all texts are in one bucket",
            COUPLING,
            "return torch.from_numpy(self._buckets[record_ids.numpy()])",
            "return torch.zeros_like(record_ids)",
        ),
    ),
    *mutants_of(
        f"{_DATA}/packed.py",
        "tests/data/test_packed.py",
        (
            "packed records have the targets of others",
            COUPLING,
            'return Rows(self.files["inputs"].rows(ids), self.targets[ids]',
            'return Rows(self.files["inputs"].rows(ids), self.targets[: len(ids)]',
        ),
        (
            "a broken packed image is trained on",
            LEAK,
            "readable=self.readable[ids], full_scale",
            "readable=None, full_scale",
        ),
        (
            "all packed texts are in one bucket",
            COUPLING,
            "return self._buckets[record_ids].long()",
            "return torch.zeros_like(record_ids)",
        ),
        (
            "packed files that have changed are read",
            RESUME,
            "    manifest.check(folder)\n    with _files_as_packed(manifest, folder):\n        train, test",
            "    with _files_as_packed(manifest, folder):\n        train, test",
        ),
    ),
    *mutants_of(
        f"{_DATA}/manifest.py",
        "tests/data/test_packed.py",
        ("hashes of packed files are not compared", RESUME, "elif verify and sha", "elif False and sha"),
    ),
    *mutants_of(
        f"{_DATA}/row_file.py",
        "tests/data/test_packed.py",
        (
            "rows come from the begin of the file",
            COUPLING,
            "self._taken(self._array[ids.numpy()])",
            "self._taken(self._array[: len(ids)].copy())",
        ),
    ),
]
