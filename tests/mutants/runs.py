# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in `runs`: what a run leaves behind, what it says, and how it is continued."""

from mutants.mutant import CHECKPOINT, CLAIM, LEAK, LEDGER, RESUME, SAMPLING, WIRING, mutants_of

_RUNS = "src/dpquant/runs"
_RESUME = "tests/runs/test_resume.py"
_DIRECTORY = "tests/runs/test_directory.py"
_PLACE = "tests/runs/test_place.py"
_BLIND = (
    "tests/invariants/test_interference.py::"
    "test_what_a_run_leaves_behind_depends_on_its_records_through_the_mechanisms_only"
)

MUTANTS = [
    *mutants_of(
        "src/dpquant/version.py",
        "tests/test_version.py",
        ("a checkout is named as it was when it was installed", CLAIM, 'package.parent.name != "src" or', "True or"),
        ("changes that are in no commit do not show", CLAIM, '"--dirty=.dirty", ', ""),
    ),
    *mutants_of(
        f"{_RUNS}/provenance.py",
        _BLIND,
        (
            "the record says when the run ended",
            LEAK,
            "cores=cores,\n",
            'cores=int(__import__("time").perf_counter_ns()),\n',
        ),
    ),
    *mutants_of(
        f"{_RUNS}/objects.py",
        "tests/app/test_check_model.py::"
        "test_a_network_that_cannot_read_the_shortest_texts_is_refused_as_a_run_refuses_it",
        (
            "a network is tried on texts of the largest length alone",
            WIRING,
            "    if len(form.lengths) > 1:\n        _check_outputs",
            "    if False:\n        _check_outputs",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/heartbeat.py",
        "tests/runs/test_heartbeat.py",
        ("a process that ended seems to go on", CLAIM, "running=False", "running=True"),
        ("a heartbeat's step follows a clock", LEAK, "step=progress.step,", "step=int(1e9 * now),", _BLIND),
        ("a heartbeat that fails ends the run", LEDGER, "contextlib.suppress(OSError)", "contextlib.nullcontext()"),
        ("a heartbeat is not said to be the operator's", LEAK, "note: str = NOT_FOR_RELEASE", 'note: str = ""'),
    ),
    *mutants_of(
        f"{_RUNS}/trackers/tracking.py",
        "tests/runs/test_trackers.py",
        ("trackers are told real times", LEAK, "lambda: began", "clock"),
        (
            "trackers are told examples a second",
            LEAK,
            "told = progress if self._unsafe else",
            "told = progress if not self._unsafe else",
        ),
        (
            "trackers are told the accuracy on training records",
            LEAK,
            "told = epoch if self._unsafe else _released(epoch)",
            "told = epoch",
        ),
        (
            "the record for trackers has the accuracy on training records",
            LEAK,
            "per_epoch=[_released(epoch) for epoch in record.per_epoch]",
            "per_epoch=record.per_epoch",
        ),
        (
            "a report with the accuracy on training records is handed over",
            LEAK,
            "if self.unsafe or not record.unsafe_metrics else []",
            "if True else []",
        ),
        ("the model is handed over unasked", LEAK, "if self.model else []", "if True else []"),
        ("a tracker that fails ends the run", LEDGER, "except Exception as error:", "except ImportError as error:"),
    ),
    *mutants_of(
        f"{_RUNS}/trackers/mlflow.py",
        "tests/runs/test_trackers.py::test_every_tracker_reaches_nobody_and_mlflow_keeps_what_the_record_says",
        (
            "MLflow is told when the run ended",
            LEAK,
            ", end_time=self._milliseconds())",
            ")",
        ),
        (
            "MLflow tells its makers",
            LEAK,
            '"MLFLOW_DISABLE_TELEMETRY"] = "true"',
            '"MLFLOW_DISABLE_TELEMETRY"] = "false"',
        ),
    ),
    *mutants_of(
        f"{_RUNS}/following.py",
        "tests/runs/test_following.py",
        (
            "a run that was killed seems to go on",
            CLAIM,
            'return "stopped" if silent > _ENDED * limit else "silent"',
            'return "running"',
        ),
        (
            "what a killed run has charged is not told",
            CLAIM,
            "epsilon=_charged_epsilon(contents) if phase in",
            "epsilon=0.0 if phase in",
        ),
        ("a ledger that was changed is watched in silence", CLAIM, "trouble = str(error)", "trouble = str()"),
    ),
    *mutants_of(
        f"{_RUNS}/alerts.py",
        "tests/runs/test_alerts.py",
        (
            "training accuracy is not told",
            CLAIM,
            "if status.unsafe_metrics else None",
            "if status.unsafe_metrics is None else None",
        ),
        (
            "a delta that promises nothing is not told",
            CLAIM,
            "grave=True) if text else None",
            "grave=True) if not text else None",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/loading.py",
        "tests/runs/test_loading.py::test_what_is_no_finished_run_or_no_longer_its_model_is_refused",
        (
            "a model that is not the record's is loaded",
            CLAIM,
            "(found := sha256(path)) != record.model_sha256:",
            '(found := sha256(path)) == "":',
        ),
        (
            "the model of a run that has not ended is loaded",
            CLAIM,
            "    if (run / RECORD).is_file():\n        return\n",
            "    if run.is_dir():\n        return\n",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/measures.py",
        "tests/app/test_evaluate.py::test_one_record_more_changes_the_count_by_at_most_one_whatever_the_model_does",
        (
            "an error of the model on one private test record is reported",
            LEAK,
            "        return False\n",
            "        raise\n",
        ),
        (
            "private test records pass the model together",
            LEAK,
            "return sum(_is_right(model, split, task, index) for index in range(len(split)))",
            "return int((model(split.batch(torch.arange(len(split)))[0]).argmax(1) == split.targets).sum())",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/pages/facts.py",
        "tests/runs/test_pages.py",
        ("a run of a known seed is said to be private", CLAIM, 'return "NOT PRIVATE" in', 'return "NOT SO" in'),
        ("checks that fail are not told", CLAIM, "if not one.holds]", "if one.holds is None]"),
    ),
    *mutants_of(
        f"{_RUNS}/pages/facts.py",
        "tests/runs/test_pages.py::test_what_an_attacker_reaches_is_never_rounded_down",
        (
            "what an attacker reaches is rounded down on the page that is signed",
            CLAIM,
            "rightly=min(1000, math.ceil(1000 * found))",
            "rightly=min(1000, math.floor(1000 * found))",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/pages/report.py",
        "tests/runs/test_pages.py",
        ("texts of a run are markup on its page", LEAK, "autoescape=True", "autoescape=False"),
    ),
    *mutants_of(
        f"{_RUNS}/train.py",
        _BLIND,
        (
            "training accuracy is written down without being asked for",
            LEAK,
            'self._metrics(self.dataset.train).get("accuracy") if unsafe else None,',
            'self._metrics(self.dataset.train).get("accuracy"),',
            "tests/runs/test_sinks.py::test_metrics_hold_one_line_an_epoch_and_nothing_from_private_data",
        ),
        (
            "accuracy is that on the training records",
            LEAK,
            "found = self._metrics(self.dataset.test)",
            "found = self._metrics(self.dataset.train)",
        ),
        (
            "the learning rate follows the training accuracy",
            LEAK,
            ("        self._check_finite()\n        unsafe = self.settings.unsafe_metrics\n"),
            (
                "        self._check_finite()\n"
                '        private.optimizer.param_groups[0]["lr"] *= 1 + self._metrics(self.dataset.train)["accuracy"]\n'
                "        unsafe = self.settings.unsafe_metrics\n"
            ),
        ),
        (
            "a model that is not finite replaces the last good one",
            CHECKPOINT,
            ("        self._check_finite()\n        unsafe = self.settings.unsafe_metrics\n"),
            "        unsafe = self.settings.unsafe_metrics\n",
            "tests/runs/test_diverging.py::test_the_model_of_the_last_finite_epoch_and_the_checkpoints_are_kept",
        ),
        (
            "a model that is not finite is saved as a checkpoint",
            CHECKPOINT,
            ('        """Write a checkpoint."""\n        self._check_finite()\n'),
            '        """Write a checkpoint."""\n',
            f"{_DIRECTORY}::test_a_run_that_diverges_keeps_checkpoints_of_finite_parameters",
        ),
        (
            "no checkpoint is loaded when a run continues",
            RESUME,
            "        if found is not None:\n",
            "        if False:\n",
            f"{_RESUME}::test_the_first_epoch_keeps_its_figures",
        ),
        (
            "a run that is asked to stop leaves no checkpoint",
            RESUME,
            "if asked or private.steps_taken >= self.saved + self.every:",
            "if private.steps_taken >= self.saved + self.every:",
            f"{_RESUME}::test_a_stopped_run_has_a_checkpoint_of_its_last_step_and_gives_back_its_lease",
        ),
        (
            "the records of a run that continues are not compared",
            RESUME,
            "        files.know_records(dataset.train, apart=settings.partition == RANGE)\n",
            "",
            f"{_RESUME}::test_other_records_are_refused_when_a_run_continues",
        ),
        (
            "an epoch's epsilon is that of the plan",
            CLAIM,
            "            epsilon=private.epsilon_spent(),\n            accuracy_test",
            "            epsilon=plan.epsilon,\n            accuracy_test",
            "tests/runs/test_train.py::test_a_record_keeps_every_epoch",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/record.py",
        "tests/runs/test_record.py",
        (
            "training accuracy is not marked as uncovered",
            CLAIM,
            'statement=(NOT_COVERED if settings.unsafe_metrics else "") + private.statement(),',
            "statement=private.statement(),",
            "tests/runs/test_train.py::test_unsafe_metrics_mark_the_run",
        ),
        ("the record holds a clock", LEAK, "seed=settings.seed,\n", "seed=int(private.seconds_train * 1e6),\n", _BLIND),
        (
            "the record's epsilon is the target",
            CLAIM,
            "            epsilon=private.epsilon_spent(),\n            delta",
            "            epsilon=plan.epsilon,\n            delta",
            "tests/runs/test_train.py::test_a_ledger_tells_what_its_run_has_spent",
        ),
        (
            "a file is replaced before it is on disk",
            CHECKPOINT,
            "        if flush:\n",
            "        if False:\n",
            "tests/invariants/test_crashes.py",
        ),
        (
            "a file is written where it is read",
            CHECKPOINT,
            'draft = path.with_name(path.name + ".tmp")',
            "draft = path",
        ),
        (
            "times are among the metrics",
            LEAK,
            '        "epsilon": epoch.epsilon,\n',
            '        "epsilon": epoch.epsilon,\n        "seconds": time.perf_counter(),\n',
            "tests/runs/test_sinks.py::test_metrics_hold_one_line_an_epoch_and_nothing_from_private_data",
        ),
        (
            "a training accuracy that was not asked for is in the metrics",
            LEAK,
            "    if epoch.nonprivate_accuracy_train is not None:\n",
            "    if True:\n",
            "tests/runs/test_sinks.py::test_metrics_hold_one_line_an_epoch_and_nothing_from_private_data",
        ),
        ("a record of a newer schema is read", CLAIM, "if isinstance(schema, int) and schema > SCHEMA:", "if False:"),
    ),
    *mutants_of(
        f"{_RUNS}/directory.py",
        _DIRECTORY,
        (
            "a seeded run's spending looks private",
            CLAIM,
            "research=any(event.research for event in events),",
            "research=False,",
            f"{_DIRECTORY}::test_what_was_spent_is_read_from_the_ledgers_own_lines",
        ),
        (
            "what was spent counts the steps alone",
            CLAIM,
            "epsilon=accounting.epsilon(events, plan.delta),",
            'epsilon=accounting.epsilon([event for event in events if event.kind == "train"], plan.delta),',
            f"{_DIRECTORY}::test_what_was_spent_is_read_from_the_ledgers_own_lines",
        ),
        (
            "metrics are not on disk when an epoch ends",
            CHECKPOINT,
            "        file.flush()\n        os.fsync(file.fileno())\n",
            "        file.flush()\n",
            "tests/invariants/test_crashes.py",
        ),
        (
            "a model that cannot be saved is found out after an epoch",
            CHECKPOINT,
            "        self.try_saving(model)\n",
            "",
            f"{_DIRECTORY}::test_what_would_fail_after_an_epoch_is_tried_before_any_charge",
        ),
        (
            "a checkpoint that does not hold is left as it is",
            CHECKPOINT,
            "            if newest(home)[0] == folder:\n                return\n",
            "            return\n",
            f"{_DIRECTORY}::test_a_checkpoint_that_does_not_hold_is_written_anew",
        ),
        (
            "no checkpoint is kept but the last",
            CHECKPOINT,
            "_KEPT = 2",
            "_KEPT = 1",
            f"{_RESUME}::test_a_broken_checkpoint_is_passed_over_and_said",
        ),
        (
            "a model that changes when it is loaded is not noticed",
            CHECKPOINT,
            "        if changed:\n",
            "        if False:\n",
            f"{_DIRECTORY}::test_what_would_fail_after_an_epoch_is_tried_before_any_charge",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/place.py",
        _PLACE,
        (
            "a run in use is begun anew",
            LEDGER,
            ("            self.check()\n            self.make(settings)\n"),
            "            self.make(settings)\n",
            "tests/runs/test_train.py::test_a_directory_in_use_is_refused",
        ),
        (
            "what a run that continues is given is not compared",
            RESUME,
            "            self.check_continues(settings)\n",
            "",
            f"{_RESUME}::test_other_settings_are_refused",
        ),
        (
            "other settings are taken when a run continues",
            RESUME,
            "        if differ:\n",
            "        if False:\n",
            f"{_RESUME}::test_other_settings_are_refused",
        ),
        (
            "a run that has ended is continued",
            RESUME,
            "        if (self.path / RECORD).exists():\n",
            "        if False:\n",
            f"{_RESUME}::test_a_run_that_has_ended_is_trained_by_nobody",
        ),
        (
            "a run that has diverged is continued",
            RESUME,
            "        if (self.path / DIVERGED).exists():\n",
            "        if False:\n",
            "tests/runs/test_diverging.py",
        ),
        (
            "a ledger that holds charges is taken back",
            LEDGER,
            ("        if self._is_charged():\n            return\n"),
            "",
        ),
        (
            "a ledger that cannot be read is taken back",
            LEDGER,
            ("        except LedgerError:\n            return True\n"),
            ("        except LedgerError:\n            return False\n"),
        ),
        (
            "the directory of a run that continues is given back",
            LEDGER,
            ("            if not continues:\n                self.give_back()\n"),
            "            self.give_back()\n",
        ),
        (
            "files of others go with the directory of a run that is refused",
            WIRING,
            "                    folder.rmdir()\n",
            "                    shutil.rmtree(folder)\n",
        ),
        (
            "a directory that was there is removed with a run that is refused",
            WIRING,
            "        if self._is_new:\n",
            "        if True:\n",
            f"{_DIRECTORY}::test_a_directory_that_was_there_stays_when_a_run_is_refused",
        ),
        (
            "a run that is refused leaves its files",
            WIRING,
            "                self.give_back()\n",
            "                pass\n",
            f"{_DIRECTORY}::test_what_would_fail_after_an_epoch_is_tried_before_any_charge",
        ),
        (
            "the fingerprint of records stays when a run is refused",
            LEAK,
            "for name in (CONFIG, LEDGER, CHOICES, METRICS, RECORDS, DESCRIPTION, TOKENIZER, PROGRESS):",
            "for name in (CONFIG, LEDGER, CHOICES, METRICS, DESCRIPTION, TOKENIZER, PROGRESS):",
        ),
        (
            "a directory gets its name before the settings are in it",
            RESUME,
            (
                "            write_whole(draft / CONFIG, settings.to_toml())\n"
                "            draft.replace(self.path)  # over an empty directory, too\n"
            ),
            (
                "            draft.replace(self.path)  # over an empty directory, too\n"
                "            write_whole(self.path / CONFIG, settings.to_toml())\n"
            ),
        ),
    ),
    *mutants_of(
        f"{_RUNS}/fingerprint.py",
        _RESUME,
        (
            "everybody may read the fingerprint of the records",
            LEAK,
            "os.chmod(path, 0o600)",
            "os.chmod(path, 0o644)",
            f"{_RESUME}::test_the_same_records_are_known_again",
        ),
        (
            "packed records are known again by a few of them alone",
            RESUME,
            "    if isinstance(train_set, Packed):\n        found.update(train_set.manifest.encode())\n",
            "",
            "tests/runs/test_packed.py::test_a_run_that_continues_refuses_another_manifest",
        ),
        (
            "fingerprints have no salt",
            LEAK,
            "else secrets.token_hex(16)",
            'else "0" * 32',
            f"{_RESUME}::test_equal_records_have_unequal_fingerprints",
        ),
        (
            "other records are taken for the same",
            RESUME,
            'elif _saved(path)["sha256"] != found:',
            "elif False:",
            f"{_RESUME}::test_other_records_are_refused",
        ),
        (
            "labels are not in the fingerprint",
            RESUME,
            "        for _, part in leaves(parts):\n",
            "        for _, part in leaves(parts[:1]):\n",
            f"{_RESUME}::test_other_records_are_refused",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/parts.py",
        "tests/runs/test_parts.py",
        (
            "two processes draw the same records, each for itself",
            SAMPLING,
            "if theirs & everywhere[other]:",
            "if False:",
        ),
        (
            "a folder on a server is another one on each machine",
            SAMPLING,
            'return found if ":" in found',
            'return found if "" in ()',
        ),
    ),
    *mutants_of(
        f"{_RUNS}/stopping.py",
        _RESUME,
        (
            "a second signal is not heard",
            RESUME,
            "            raise KeyboardInterrupt\n",
            "            return\n",
            f"{_RESUME}::test_the_first_signal_is_kept_and_the_second_interrupts",
        ),
        (
            "a signal is not kept",
            RESUME,
            "            self.asked, self._since = signal.Signals(number), self._clock()\n",
            "            self.asked, self._since = None, self._clock()\n",
            f"{_RESUME}::test_the_first_signal_is_kept_and_the_second_interrupts",
        ),
        (
            "the echo of a signal interrupts a run of several processes",
            RESUME,
            "        elif self._clock() >= self._since + self._echo:\n",
            "        else:\n",
            f"{_RESUME}::test_the_echo_of_a_signal_is_the_same_signal",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/shared.py",
        "tests/runs/test_shared.py",
        (
            "every process writes the run directory",
            CHECKPOINT,
            "        first_says(self._group, write)\n",
            "        write()\n",
            "tests/runs/test_shared.py::test_the_first_writes_and_both_fail_where_it_does",
        ),
        (
            "every process takes the place",
            RESUME,
            "continues = first_says(self._group, lambda: stack.enter_context(take))",
            "continues = stack.enter_context(take)",
            "tests/runs/test_shared.py::test_both_get_the_place_that_the_first_has_taken",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/settings.py",
        "tests/runs/test_settings.py",
        (
            "checkpoints are as often as the disk is slow",
            CHECKPOINT,
            "return math.ceil(max(wanted, write_seconds / (_SHARE * step_seconds), 1))",
            "return math.ceil(max(write_seconds / (_SHARE * step_seconds), 1))",
            f"{_RESUME}::test_checkpoints_are_as_often_as_asked",
        ),
    ),
    *mutants_of(
        f"{_RUNS}/sinks.py",
        "tests/runs/test_sinks.py",
        (
            "an error of a sink is swallowed",
            LEDGER,
            (
                "            except Exception as error:  # a user's sink may raise anything; "
                "it got nothing private to quote\n                raise SettingError("
            ),
            "            except ZeroDivisionError as error:\n                raise SettingError(",
            "tests/runs/test_sinks.py::test_a_sink_that_raises_ends_the_run_with_one_error",
        ),
    ),
]
