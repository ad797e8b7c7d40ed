# SPDX-License-Identifier: Apache-2.0
"""The questions that a privacy officer or an auditor asks, each with a short answer and the section that has the rest.

They follow NIST SP 800-226, the Deployments Registry of OpenDP and section 5.3 of Ponomareva et al., arXiv 2303.00654.
"""

import dataclasses

from dpquant.privacy.meaning import percent_up
from dpquant.privacy.plan import rounded_up
from dpquant.privacy.statement import TRUSTED
from dpquant.runs.pages.facts import Facts
from dpquant.runs.record import RunRecord
from dpquant.runs.score import score_of

NOT_DECLARED = "not declared"
NOT_RECORDED = "not recorded by this version of dpquant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, its answer in short, and the id of the section of the page that says more."""

    question: str
    answer: str
    section: str


ASSUMPTIONS = (
    (
        "Each record is drawn on its own with the same probability; no batch is filled, cut or skipped",
        "tests/privacy/test_sampling.py",
    ),
    (
        "The noised sum is divided by a public constant, never by the size of the batch",
        "tests/invariants/test_calls.py",
    ),
    ("One record moves a sum by at most the clipping norm, quantized or not", "tests/invariants/test_sensitivity.py"),
    (
        "One record does not change what another one contributes: scales are per example",
        "tests/checks/test_isolation.py",
    ),
    ("The noise is normal, with the stated deviation, and independent between steps", "tests/privacy/test_noise.py"),
    ("Every use of data is charged to the ledger on disk before a record is read", "tests/invariants/test_charges.py"),
    ("A crash at any moment leaves as much charged as was used", "tests/invariants/test_crashes.py"),
    (
        "Nothing that a run leaves behind depends on its records but by the mechanism",
        "tests/invariants/test_interference.py",
    ),
    ("Epsilon agrees with a closed form and with other accountants", "tests/privacy/test_accounting.py"),
)
"""(what the accounting takes for granted, the tests that hold it); each test has a twin that plants the fault."""

RELEASED = (
    ("The model", "parameters and buffers after the last epoch, in model.safetensors"),
    ("Its intermediate states", "covered as if every one of them were published; the operator keeps two checkpoints"),
    ("Scores of the layers", "noised and charged; the record has them for every analysis"),
    ("The choice of layers in every epoch", "follows from the scores and a public seed"),
    ("Epsilon after every epoch", "follows from the ledger"),
    ("Test accuracy after every epoch", "NOT covered: measured on the test records"),
)


def answers(facts: Facts) -> list[Answer]:
    """Return all questions with their answers about one run."""
    record = facts.record
    said = record.declared or {}
    meaning = facts.meaning
    plan, ledger = record.plan, record.ledger

    def declared(name: str) -> str:
        return "left out" if facts.redacted else said.get(name, NOT_DECLARED)

    score = score_of(record)
    releases = f"{record.steps:,} steps" if facts.events is None else f"{sum(e.count for e in facts.events):,} releases"
    risk = "no finite epsilon"
    if meaning is not None:
        found = percent_up(meaning.at(0.01).true_positive_rate)
        risk = f"at 1 % false accusations at most {found} of the members are found out"
    person = "" if facts.records_per_person is None else f"; a person has at most {facts.records_per_person}, declared"
    second = NOT_RECORDED if record.epsilon_rdp is None else rounded_up(record.epsilon_rdp)
    seed = "KNOWN SEED: not private" if facts.research else "AES-128 in counter mode, keyed by the operating system"
    channels = "Last bits of floating point, timing and memory are not covered"
    if plan is not None and plan.noise == "discrete":
        channels = "Discrete noise: exact bits; timing and memory are not covered"
    charged = NOT_RECORDED
    if ledger is not None and plan is not None:
        charged = f"{ledger.count('train'):,} of {plan.steps:,} steps charged"
    rows = [
        (
            "What is promised, to whom, against whom?",
            "Each record, against whoever has the model, everything released and all other records",
            "promise",
        ),
        (
            "Whose data differ between neighbours: a record, a person, a household?",
            f"One record, added or removed{person}",
            "persons",
        ),
        (
            "Epsilon and delta, which variant, and is delta below one in the records?",
            f"({rounded_up(record.epsilon)}, {record.delta:g}), approximate DP; {_delta(facts)}",
            "deltas",
        ),
        ("What does that epsilon mean in risk?", risk, "meaning"),
        ("What exactly is released?", "The model, its states, scores, schedule, test accuracy", "released"),
        (
            "Which outputs are not covered?",
            f"Test accuracy, {'TRAINING ACCURACY, ' if record.unsafe_metrics else ''}timing",
            "uncovered",
        ),
        (
            "Which accesses to the data are counted: tuning and pre-processing too?",
            f"This run's alone. Tuning: {declared('tuning')}",
            "declared",
        ),
        (
            "What do all models of these people's data cost together?",
            "dpquant total RUN... composes their ledgers",
            "verify",
        ),
        (
            "Mechanism, sensitivity, clipping norm, sampling rate, number of releases?",
            f"Poisson-subsampled Gaussian, C = {record.max_grad_norm:g}, q = {record.sample_rate:.4g}, {releases}",
            "mechanism",
        ),
        (
            "Are the accountant's assumptions true of the code?",
            f"{len(ASSUMPTIONS)} assumptions, each with its tests",
            "assumptions",
        ),
        (
            "Which accountant, version, grid and rounding; a second opinion?",
            f"Privacy loss distributions, rounded up; Renyi: {second}",
            "accountant",
        ),
        (
            "Can I recompute it?",
            f"dpquant verify RUN: {f'{len(facts.wrong)} checks DO NOT HOLD' if facts.wrong else 'all checks hold'}",
            "verify",
        ),
        ("Where does the noise come from, and is a seed known?", seed, "randomness"),
        ("Floating point, timing, memory: side channels?", channels, "uncovered"),
        ("Can a crash or an abort lose or hide budget?", f"It can waste some, never hide it: {charged}", "ledger"),
        (
            "Who must be trusted with the raw data, and where did it run?",
            f"Central model: whoever ran it{_network(record)}. {declared('custodian')}",
            "declared",
        ),
        ("One release or many, and when does the budget renew?", declared("release"), "declared"),
        ("What was taken as public?", "Settings, size estimate, classes, shapes and types of a record", "public"),
        (
            "Pre-trained weights: trained on what, with which overlap?",
            _pretraining(record, declared("pretraining")),
            "declared",
        ),
        (
            "What did privacy cost in accuracy, and for whom?",
            f"{score.title} {score.text(score.last, 2)}; beside a baseline: dpquant report RUN BASELINE",
            "results",
        ),
        (
            "Is the test set independent, and may its numbers be published?",
            "Test records are not protected by this epsilon",
            "results",
        ),
        (
            "Was it attacked or audited?",
            "Not in this record: dpquant audit RUN tries to refute epsilon",
            "assumptions",
        ),
        (
            "Which code, which settings, can it run again?",
            f"dpquant {record.dpquant}, torch {record.torch}; config.toml runs it again",
            "reproduce",
        ),
        ("Who signs, when, and why this epsilon?", f"Sign the first page. Why: {declared('justification')}", "sign"),
    ]
    return [Answer(question=question, answer=answer, section=section) for question, answer, section in rows]


def _network(record: RunRecord) -> str:
    """Return who else is trusted: of several processes, who has their machines or the network between them."""
    return f"; it had several processes: {TRUSTED}" if TRUSTED in record.statement else ""


def _pretraining(record: RunRecord, said: str) -> str:
    """Return where a run's first weights came from, as far as the name of its model says, and what was declared."""
    if ":" in record.model:  # hf:PATH or module:function
        return f"Weights as {record.model} has or makes them. Trained on what: {said}"
    return f"None: {record.model} begins with random weights" + ("" if said == NOT_DECLARED else f". Declared: {said}")


def _delta(facts: Facts) -> str:
    records = facts.record.records
    if records is None:
        return "the number of records is not public"
    relation = "below" if facts.record.delta * records < 1 else "NOT below"
    return f"delta is {relation} 1/{records:,}"
