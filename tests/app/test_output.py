# SPDX-License-Identifier: Apache-2.0
"""What is printed where: results on standard output, progress on standard error, and less or more as asked for."""

import contextlib
import io
import types

import pytest
from rich.console import Console

from dpquant.app.cli import run
from dpquant.app.output import Output, Phases, using
from dpquant.app.progress import RunProgress
from dpquant.errors import SettingError
from dpquant.runs.record import EpochRecord
from dpquant.runs.sinks import Progress

SHORT = ["train", "--epochs", "1", "--policy", "none", "--microbatch-size", "64"]


@pytest.mark.parametrize(
    ("arguments", "quiet", "verbose", "color", "rest"),
    [
        (["plan"], 0, False, "auto", ["plan"]),
        (["plan", "-q", "--epochs", "2"], 1, False, "auto", ["plan", "--epochs", "2"]),
        (["-qq", "plan"], 2, False, "auto", ["plan"]),
        (["plan", "-q", "--quiet"], 2, False, "auto", ["plan"]),
        (["-v", "plan", "--color", "never"], 0, True, "never", ["plan"]),
        (["plan", "--color=always"], 0, False, "always", ["plan"]),
        (["ledger", "--", "-q"], 0, False, "auto", ["ledger", "--", "-q"]),
    ],
)
def test_options_of_output_stand_anywhere(arguments, quiet, verbose, color, rest):
    assert Output.split(arguments) == (Output(quiet, verbose, color), rest)


def test_a_color_that_does_not_exist_is_refused():
    with pytest.raises(SettingError, match="Did you mean never"):
        Output.split(["plan", "--color", "nevr"])


@pytest.mark.parametrize(("color", "colored"), [("always", True), ("never", False), ("auto", False)])
def test_colors_are_as_asked_for(color, colored, capsys):
    Output(color=color).console(results=True).print("[red]x[/red]")
    assert ("\x1b[" in capsys.readouterr().out) == colored


@pytest.mark.parametrize(("variable", "colored"), [("NO_COLOR", False), ("FORCE_COLOR", True)])
def test_the_usual_variables_are_heeded(variable, colored, capsys, monkeypatch):
    monkeypatch.setenv(variable, "1")
    Output().console(results=True).print("[red]x[/red]")
    assert ("\x1b[31m" in capsys.readouterr().out) == colored


@pytest.mark.parametrize("asked", [{"color": "always"}, {}])
def test_colors_make_no_terminal_of_a_pipe(asked, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Output(**asked).console(results=False).is_terminal


def test_results_go_to_standard_output_and_progress_elsewhere(capsys, tmp_path):
    assert run([*SHORT, "--out", str(tmp_path / "run"), "-v"]) == 0
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out and "epoch" not in captured.out and "\x1b" not in captured.out
    lines = captured.err.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["data", "training", "privacy"]
    phases = ("loading torch", "loading the data", "checking the model", "measuring this machine", "trying everything")
    for line, phase in zip(lines[3:8], phases, strict=True):
        assert line.startswith(f"{phase}") and line.endswith(" s")
    assert lines[8].startswith("epoch 1/1: epsilon 8.00/8.00, test ") and "\r" not in captured.err
    for words in ("not for release", "report.html", "dpquant evaluate", "dpquant export"):
        assert any(words in line for line in lines[9:]), words


@pytest.mark.parametrize(("quiet", "results"), [("-q", True), ("-qq", False)])
def test_quiet_leaves_the_result_and_twice_quiet_nothing(quiet, results, capsys, tmp_path):
    assert run([*SHORT, quiet, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and ("test accuracy" in captured.out) == results and "Neighbouring" not in captured.out


class _Closed(io.StringIO):
    """A pipe whose reader has gone, or a full disk, once something was written."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_progress_that_cannot_be_printed_ends_no_run(tmp_path, capsys):
    with contextlib.redirect_stderr(_Closed()):
        assert run([*SHORT, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "record.json").exists()
    assert "test accuracy" in capsys.readouterr().out


def test_progress_that_ends_a_run_would_be_seen():
    with contextlib.redirect_stderr(_Closed()), pytest.raises((BrokenPipeError, SystemExit)):
        Console(stderr=True).print("epoch 1")


def test_an_error_is_printed_however_quiet(capsys):
    assert run(["plan", "-qq", "--epochs", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected epochs")


def shown_on_a_terminal(width, progress=RunProgress, *, metrics=None, terminal=True):
    """What a run of many large numbers shows on a terminal."""
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    numbers = {"epochs": 100, "steps": 1000, "num_layers": 120, "examples_per_second": 12_345.6}
    with progress(screen) as bar:
        bar.started(types.SimpleNamespace(epsilon=100.0, epochs=100), None)
        for epoch in (98, 99):
            step = Progress(
                epoch=epoch,
                step=10 * epoch,
                epsilon=98.123,
                layers_quantized=100,
                macs_quantized=0.8,
                accuracy_test=0.991,
                **numbers,
            )
            bar.stepped(step)
            bar.epoch_ended(
                EpochRecord(
                    index=epoch, epsilon=epoch + 1.0, accuracy_test=0.987, layers_quantized=[], scores=None,
                    nonprivate_accuracy_train=None, metrics_test=metrics,
                )
            )  # fmt: skip
    return screen.file.getvalue()


def assert_nothing_is_cut(progress):
    for width in (80, 120):
        shown = shown_on_a_terminal(width, progress)
        assert "…" not in shown and "epoch 100/100" in shown and "12,346 examples/s" in shown and "98.7%" in shown
        assert ("layers quantized" in shown) == (width == 120)


def test_nothing_is_cut_at_eighty_columns():
    assert_nothing_is_cut(RunProgress)


def test_of_rare_positives_the_average_precision_is_shown():
    """Their accuracy is that of a model that always says no."""
    metrics = {"accuracy": 0.987, "average_precision": 0.1234}
    shown = shown_on_a_terminal(80, metrics=metrics)
    assert "…" not in shown and "AP 0.1234" in shown and "98.7%" not in shown
    shown = shown_on_a_terminal(80, metrics=metrics, terminal=False)
    assert "test average precision 0.1234" in shown and "98.7%" not in shown


class Crowded(RunProgress):
    def __init__(self, console):
        super().__init__(console)
        self._bar.columns = (*self._bar.columns, *self._bar.columns)


def test_what_is_cut_would_be_seen():
    with pytest.raises(AssertionError):
        assert_nothing_is_cut(Crowded)


def test_epsilon_at_the_end_of_an_epoch_is_the_one_after_it():
    assert shown_on_a_terminal(80).rpartition("epsilon ")[2].startswith("100.00/100.00")


def test_a_phase_says_what_it_takes_when_it_is_over(capsys):
    phases = Phases()
    phases.begin("loading")
    assert capsys.readouterr().err == "loading ... "
    phases.begin("checking")
    phases.over()
    phases.over()
    assert [line[-2:] for line in capsys.readouterr().err.splitlines()] == [" s", " s"]
    with using(Output(quiet=1)):
        Phases().begin("nothing")
    assert capsys.readouterr().err == ""
