# SPDX-License-Identifier: Apache-2.0
"""Names of the files of a run directory. This module loads no torch."""

CONFIG, LEDGER, METRICS = "config.toml", "ledger.jsonl", "metrics.jsonl"
MODEL, RECORD, TIMINGS, CHOICES = "model.safetensors", "record.json", "timings.json", "choices.json"
CHECKPOINTS, RECORDS, DIVERGED, REPORT = "checkpoints", "records.json", "diverged.txt", "report.html"
DESCRIPTION, TOKENIZER, PROGRESS = "model.json", "tokenizer.json", "progress.json"
EVALUATION, RELEASES = "evaluation.json", "test-releases.jsonl"
TRACKERS = "trackers"  # a folder for each of them
SPENT = "ledger.json"  # of an export: what a ledger says, without its lines
