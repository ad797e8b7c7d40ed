# SPDX-License-Identifier: Apache-2.0
"""Prints the results of `dpquant`'s verbs as tables, and shows a progress bar.

Importing this file loads neither torch nor the accountant, so that `dpquant --help` answers at once.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dpquant.app.assess import Assessment
    from dpquant.app.bench import BenchRecord
    from dpquant.app.check_model import ModelCheck
    from dpquant.app.compare import Comparison
    from dpquant.app.export import Export
    from dpquant.app.spent import Account, Total
    from dpquant.app.verify import Verification
    from dpquant.audits.report import Audit
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.record import EpochRecord, RunRecord
    from dpquant.runs.settings import TrainSettings
    from dpquant.runs.sinks import Progress as TrainProgress


def print_run(console: Console, record: "RunRecord", folder: Path) -> None:
    """Print the results of a training run and its privacy statement."""
    from dpquant.privacy.plan import rounded_up

    result = Table(show_header=False, box=None)
    if record.accuracy_test is not None:
        result.add_row("test accuracy", f"{record.accuracy_test:.2%}")
    for name, value in (record.metrics_test or {}).items():
        if name != "accuracy":
            result.add_row(f"test {name.replace('_', ' ')}", f"{value:.4g}")
    result.add_row("epsilon spent", f"{rounded_up(record.epsilon)} (delta {record.delta:g})")
    result.add_row(
        "ran quantized",
        f"{record.quantized_fraction_layers:.0%} of layers, {record.quantized_fraction_macs:.0%} of MACs",
    )
    result.add_row("execution", record.execution)
    result.add_row("run directory", str(folder))
    console.print(result)
    console.print(f"\n{record.statement}", markup=False, highlight=False)


def print_bench(console: Console, record: "BenchRecord") -> None:
    """Print the table of a benchmark, an explanation of its columns, and the machine."""
    settings, side = record.settings, record.settings.image_size
    inputs = "" if side is None else f"{side}x{side}, "
    console.print(f"{settings.model}, {inputs}batch {settings.batch_size}, {settings.format}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    header, *rows = record.table()
    for number, title in enumerate(header):
        table.add_column(title, justify="left" if number in (0, len(header) - 1) else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [
        "\nMedian of the rounds, and quartiles. 'plain / this' is plain PyTorch's time over this side's: above 1, this "
        "side is faster. Opacus is its hooks; ours are dpquant in full precision, with 90 % of the multiplications "
        "quantized, and with all.",
        f"\n{record.hardware}; opacus {record.opacus}, {record.threads} threads",
    ]
    if record.busy:
        lines.append(
            f"Warning: other work kept {record.hardware.load} processors busy when the measurement began. These "
            "timings are not to be trusted. Run it again on an idle machine."
        )
    console.print("\n".join(lines), markup=False, highlight=False)


def print_assessment(console: Console, found: "Assessment") -> None:
    """Print an assessment: layers, steps, the speed-up of a whole run, the paper's model, and warnings."""
    layers = Table(box=None, pad_edge=False)
    titles = ("layer", "million MACs", "share of time", "gain", "last impact")
    for number, title in enumerate(titles):
        layers.add_column(title, justify="right" if number else "left")
    for name, layer in found.layers.items():
        layers.add_row(
            name,
            f"{layer.macs / 1e6:.2f}",
            f"{found.batch_size * layer.full / found.full_step:.1%}",
            f"{layer.gain:.2f}",
            f"{found.impacts[name]:.2g}" if name in found.impacts else "-",
        )
    steps = Table(box=None, pad_edge=False)
    for number, title in enumerate(("layers quantized", "MACs", "predicted s", "measured s", "speed-up", "error")):
        steps.add_column(title, justify="right" if number else "left")
    for policy in found.policies:
        seconds = policy.predicted if policy.measured is None else policy.measured
        steps.add_row(
            f"{len(policy.layers)} of {len(found.layers)}",
            f"{policy.share_of_macs:.0%}",
            f"{policy.predicted:.3f}",
            "-" if policy.measured is None else f"{policy.measured:.3f}",
            f"{found.full_step / seconds:.2f}",
            "-" if policy.measured is None else f"{policy.predicted / policy.measured - 1:+.0%}",
        )
    console.print(f"{found.model}, {found.format}, batch {found.batch_size:g}\n", highlight=False)
    console.print(layers)
    console.print("\nA step:", highlight=False)
    console.print(steps)
    assumed = "; ".join(f"{speedup:g} times if {share:.0%}" for speedup, share in found.paper.items())
    lines = [
        f"\nA step in full precision spends {found.overhead:.0%} of its time beyond these layers.",
        f"An analysis takes {found.analysis:.1f} s." if found.analysis else "No analyses are needed.",
        f"A run of these settings, analyses included, is {found.speedup:.2f} times as fast as in full precision.",
        "Quantized layers are taken as measured here."
        if found.profile == "here"
        else "Quantized layers are taken to run four times as fast, as FP4 against FP16; quantizing is taken as free.",
        f"The paper's model (4-bit work four times as fast, 90 % of it): {assumed} of a step cannot be sped up; "
        f"{found.paper_here:.2f} times with the {found.overhead:.0%} measured here.",
    ]
    if found.saved is not None:
        lines.append(f"In a month that saves {found.saved.hours:,.1f} hours, which cost {found.saved.money:,.2f}.")
    lines += [f"Warning: {sign}" for sign in found.warnings]
    lines.append(f"\n{found.hardware}")
    console.print("\n".join(lines), markup=False, highlight=False)


def print_comparison(console: Console, comparison: "Comparison", folder: Path) -> None:
    """Print one row per policy, and the epsilon of all runs together."""
    from dpquant.privacy.plan import rounded_up

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("policy", "test accuracy, %", "MACs quantized", "in 4 bits", "epsilon", "seconds")):
        table.add_column(title, justify="right" if number else "left")
    for policy, row in comparison.rows.items():
        interval = "" if row.half_width is None else f" +- {100 * row.half_width:.2f}"
        table.add_row(
            policy,
            f"{100 * row.mean:.2f}{interval}",
            f"{row.quantized_fraction_macs:.0%}",
            f"{row.four_bit_fraction_macs:.0%}",
            rounded_up(row.epsilon),
            "-" if row.seconds is None else f"{row.seconds:,.0f}",
        )
    console.print(table)
    together = rounded_up(comparison.epsilon_together)
    console.print(
        f"\nMeans over seeds, with 95 % confidence intervals. Epsilon is one run's, at delta = {comparison.delta:g}; "
        f"whoever sees all runs has epsilon = {together} for them together, interrupted ones included. Seconds are the "
        f"operator's, not for release.\nPicture and record: {folder}",
        markup=False,
        highlight=False,
    )


def print_account(console: Console, account: "Account") -> None:
    """Print what each ledger says and, of several, what all runs have spent together."""
    from dpquant.privacy.plan import rounded_up

    for path, contents in account.ledgers.items():
        spent, table = account.runs[path], Table(show_header=False, box=None, pad_edge=False)
        planned = "" if contents.budget is None else f", of {rounded_up(contents.budget.epsilon)} planned"
        table.add_row("ledger", f"{path}: sound")
        if contents.run:
            table.add_row("run", f"{contents.run}, dpquant {contents.version}")
        table.add_row("attempts", f"{contents.attempts}")
        for event in contents.events:
            what = f"{event.count} {'steps' if event.kind == 'train' else 'analyses'}"
            table.add_row("charged", f"{what}, sample rate {event.sample_rate:.6g}, noise {event.noise_multiplier:.4f}")
        table.add_row("epsilon", f"{rounded_up(spent.epsilon)} (delta {spent.delta:g}){planned}")
        table.add_row("head", contents.head)
        if contents.torn:
            table.add_row("torn", f"a last line of {contents.torn} bytes, which charges nothing")
        if contents.research:
            table.add_row("NOT PRIVATE", "sampling or noise came from a given seed")
        console.print(table, highlight=False)
        console.print()
    if len(account.ledgers) > 1:
        together = account.together
        console.print(
            f"All runs together, if on the same data: epsilon = {rounded_up(together.epsilon)} at delta = "
            f"{together.delta:g}, {together.count('train')} steps and {together.count('analysis')} analyses. Runs "
            "that only tuned settings count.",
            markup=False,
            highlight=False,
        )


def print_total(console: Console, found: "Total") -> None:
    """Print what runs on the same people cost together."""
    from dpquant.privacy.plan import rounded_up

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("run", "epsilon", "steps", "analyses")):
        table.add_column(title, justify="right" if number else "left")
    for path, spent in found.account.runs.items():
        table.add_row(str(path), rounded_up(spent.epsilon), f"{spent.count('train')}", f"{spent.count('analysis')}")
    console.print(table, highlight=False)
    console.print(f"\n{found.told} Runs that only tuned settings count.", markup=False, highlight=False)


def print_verification(console: Console, found: "Verification") -> None:
    """Print one line for each thing that was checked, then the verdict."""
    for one in found.findings:
        line = f"{'ok    ' if one.holds else 'WRONG '} {one.what}: {' '.join(one.detail.split())}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name in found.skipped:
        line = f"-      {name}: not recorded by this version of dpquant"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = sum(not one.holds for one in found.findings)
    verdict = f"{found.run}: {len(found.findings)} checks, all hold." if found.holds else f"{found.run}: {wrong} WRONG."
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)


def print_model_check(console: Console, found: "ModelCheck") -> None:
    """Print a model's layers, how the live check went, and everything that has to change."""
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("layer", "kind", "parameters", "million MACs", "quantized in", "notes")):
        table.add_column(title, justify="right" if number in (2, 3) else "left")
    for layer in found.layers:
        macs = "-" if layer.macs is None else f"{layer.macs / 1e6:.3f}"
        table.add_row(
            layer.name or "(the model)",
            layer.kind,
            f"{layer.parameters:,}",
            macs,
            layer.format or "-",
            ", ".join(filter(None, (layer.reason, layer.notes))),
        )
    if found.fixed_model is not None:
        console.print(f"The fixed model:\n{found.fixed_model}\n", markup=False, highlight=False)
    console.print(table, highlight=False)
    went = ", ".join(f"{what}: {how}" for what, how in found.probe.items())
    lines = [f"\nLive check on synthetic records, {went} ({found.probed})."]
    for number, one in enumerate(found.findings, 1):
        where = f"{one.module or 'the model'} ({one.kind}): " if one.kind else ""
        lines.append(f"\n{number}. {where}{one.problem}" + (f".\n   {one.fix}." if one.fix else ""))
    count = len(found.findings)
    lines.append(f"\n{count} to change: a run would refuse this model." if count else "\nNothing has to change.")
    console.print("\n".join(lines), markup=False, highlight=False)


def print_export(console: Console, done: "Export") -> None:
    """Print what was copied and what was left, with reasons."""
    table = Table(box=None, pad_edge=False)
    for title in ("file", "", "what it is, or why it was left"):
        table.add_column(title)
    for one in done.copied:
        table.add_row(one.name, "copied", one.what)
    for name, why in done.left.items():
        table.add_row(name, "left", why)
    console.print(table, highlight=False)
    console.print(f"\n{done.told}\n\n{done.statement}", markup=False, highlight=False)


def print_budget(console: Console, budget: "PrivacyPlan") -> None:
    """Print the table of a privacy plan."""
    _print_rows(console, "privacy budget", budget.table())


def print_meaning(console: Console, budget: "PrivacyPlan", records: int | None) -> None:
    """Print what the budget means in risk, and a warning if delta is too large for a public number of records."""
    from dpquant.privacy.meaning import too_large

    if rows := budget.meaning_table():
        _print_rows(console, "what it means", rows)
    if warning := too_large(budget.delta, records):
        console.print(f"Warning: {warning}", markup=False, highlight=False)


def _print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for what, how_much in rows:
        table.add_row(what, how_much)
    console.print(table)


def print_audit(console: Console, found: "Audit") -> None:
    """Print an audit: what was claimed and found, how likely faults would have been found, and the verdict."""
    from dpquant.privacy.plan import rounded_up

    console.print(f"{found.run}: epsilon {rounded_up(found.epsilon)}, delta {found.delta:g}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("trial", "claimed", "found", "p-value", "chance to find a fault")):
        table.add_column(title, justify="right" if 0 < number < 4 else "left")
    for tap in found.taps:
        name = f"taps, {tap.format or 'full precision'}"
        table.add_row(
            f"{name}: noise", f"{tap.noise_claimed:.4f}", f"{tap.noise_measured:.4f}", f"{tap.noise_p:.2g}",
            f"halved: {tap.power['noise halved']:.0%}",
        )  # fmt: skip
        table.add_row(
            f"{name}: mean", f"{tap.contribution_claimed:.4f}", f"{tap.contribution_measured:.4f}",
            f"{tap.contribution_p:.2g}", f"doubled: {tap.power['contribution doubled']:.0%}",
        )  # fmt: skip
    for game in found.games:
        table.add_row(
            f"game, {game.release}: mu", f"{game.mu_claimed:.4f}", f">= {game.mu_bound:.4f}",
            f"{game.p_value:.2g}", f"noise halved: {game.power['noise halved']:.0%}",
        )  # fmt: skip
    one = found.one_run
    if one is not None:
        table.add_row(
            "training with canaries: epsilon",
            "infinite" if one.epsilon_claimed is None else f"{one.epsilon_claimed:.4f}",
            f">= {one.epsilon_bound:.4f}", f"{one.p_value:.2g}",
            f"noise halved: {one.power['noise halved']:.0%}, epsilon doubled: {one.power['epsilon doubled']:.0%}",
        )  # fmt: skip
    console.print(table)
    lines = ["\nLower bounds hold with 95 % confidence. A bound below the claim does not prove the claim."]
    if one is not None:
        true = "no true epsilon" if one.detectable is None else f"only a true epsilon above {one.detectable:.2f}"
        lines += [
            f"Bound for a Gaussian curve: {one.epsilon_bound_gaussian:.4f}. With {one.canaries} canaries no claim "
            f"above {one.ceiling:.2f} can be refuted; against this claim the best attack finds {true} nine times in "
            "ten. The attack by losses that was made finds less. Wrong noise or sensitivity is for tap and game to "
            "find; a training with canaries is an alarm for what they do not run.",
            f"The copy in {found.copy} was trained on the private records. DO NOT RELEASE IT. Whoever publishes these "
            f"numbers adds the copy's epsilon to the run's: dpquant ledger {found.run} {found.copy}",
        ]
    lines.append(
        f"\nREFUTED: with a claim that holds, this happens once in {1 / found.false_alarm:,.0f} audits or less."
        if found.refuted
        else "\nNot refuted."
    )
    console.print("\n".join(lines), markup=False, highlight=False)


class ProgressBar:
    """Sink that prints the budget when the run starts, then shows a progress bar.

    The budget is not printed earlier, so that a refused run prints nothing but its error.
    """

    def __init__(self, console: Console):
        self._console = console
        self._budget: PrivacyPlan
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("epsilon {task.fields[epsilon]}"),
            TextColumn("{task.fields[speed]} examples/s"),
            TextColumn("{task.fields[layers]} layers quantized"),
            TextColumn("test {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def started(self, plan: "PrivacyPlan", settings: "TrainSettings") -> None:
        self._budget = plan
        print_budget(self._console, plan)

    def stepped(self, progress: "TrainProgress") -> None:
        from dpquant.privacy.plan import rounded_up

        shown: dict[str, Any] = {
            "epoch": f"{progress.epoch + 1}/{progress.epochs}",
            "epsilon": f"{rounded_up(progress.epsilon, 2)}/{rounded_up(self._budget.epsilon, 2)}",
            "speed": f"{progress.examples_per_second:,.0f}",
            "layers": f"{progress.layers_quantized}/{progress.num_layers}",
            "accuracy": "-" if progress.accuracy_test is None else f"{progress.accuracy_test:.1%}",
        }
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.steps, **shown)
            self._bar.start()
        self._bar.update(self._task, completed=progress.step)
        self._bar.tasks[self._task].fields.update(shown)

    def epoch_ended(self, epoch: "EpochRecord") -> None:
        """Do nothing: the next step shows the epoch's accuracy."""

    def finished(self, record: "RunRecord") -> None:
        """Do nothing: the verb prints the record."""
