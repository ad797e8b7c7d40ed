# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the room `training`: what a step and an analysis are made of, records, checkpoints and resuming."""

from mutants.mutant import (
    ACCOUNTING,
    ANALYSIS,
    CHECKPOINT,
    CLAIM,
    COUPLING,
    LEAK,
    LEDGER,
    NOISE,
    RESUME,
    SAMPLING,
    SECRET,
    SENSITIVITY,
    WIRING,
    mutants_of,
)

_REPLACING = "tests/training/test_replacing.py"
_TRAINING = "src/dpquant/training"
_CALLS = "tests/invariants/test_calls.py"
_AUTO = "tests/training/test_auto_format.py"
_PRIVATE = "tests/training/test_private.py"
_RECORDS = "tests/training/test_records.py"
_CHECKPOINT = "tests/training/test_checkpoint.py"
_CONTINUING = "tests/training/test_continuing.py"
_IMPACT = "tests/training/test_impact.py"
_ATTACKS = "tests/test_attacks.py"
_TWO = "tests/training/test_distributed.py"
_STEPS = "tests/training/test_steps.py"
_PARTITION = "tests/training/test_partition.py"
_EXACT = "tests/engine/test_exact_sum.py"
_POROSITY = "tests/invariants/test_porosity.py"

MUTANTS = [
    *mutants_of(
        f"{_TRAINING}/partition.py",
        _PARTITION,
        (
            "every process' records begin at id 0, so that two share their draws",
            SAMPLING,
            "cls(range(ends[group.rank] - count, ends[group.rank]), by_range=True)",
            "cls(range(count), by_range=True)",
        ),
        (
            "records of a process' own are shared out once more, and drawn at half the rate",
            SAMPLING,
            "return (record_ids, slice(None)) if self.by_range else cut(record_ids, group, whole=whole)",
            "return cut(record_ids, group, whole=whole)",
        ),
        (
            "a process asks for what was drawn for the others",
            SAMPLING,
            "return drawn[drawn >= self.ids.start] if self.by_range else drawn",
            "return drawn",
        ),
        (
            "exact sums are taken with records that are not shared",
            SENSITIVITY,
            "if how == RANGE and exact_sums:",
            "if False:",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/private.py",
        f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        (
            "an empty batch is no step",
            SAMPLING,
            "        began = time.perf_counter()\n        self._drawn = None\n",
            "        began = time.perf_counter()\n        self._drawn = None\n"
            "        if len(batch.record_ids) == 0:\n            return\n",
            f"{_PRIVATE}::test_an_empty_batch_is_a_step_like_any_other",
        ),
        (
            "a step is charged after its data was used",
            LEDGER,
            '        self._charge("train", self.plan, self.steps_taken)\n'
            "        self._advance(steps_taken=self.steps_taken + 1)\n"
            "        without_details(lambda: self._descend(batch), self.choices, self._device)\n",
            "        without_details(lambda: self._descend(batch), self.choices, self._device)\n"
            '        self._charge("train", self.plan, self.steps_taken)\n'
            "        self._advance(steps_taken=self.steps_taken + 1)\n",
        ),
        (
            "an analysis is charged after its data was used",
            LEDGER,
            '        self._charge("analysis", self._analysis, number)\n'
            "        self._advance(analyses_made=number + 1)\n"
            '        batch = self._draw("analysis", self._analysis, number)\n'
            "        without_details(lambda: self._score(batch), self.choices, self._device)\n",
            "        self._advance(analyses_made=number + 1)\n"
            '        batch = self._draw("analysis", self._analysis, number)\n'
            "        without_details(lambda: self._score(batch), self.choices, self._device)\n"
            '        self._charge("analysis", self._analysis, number)\n',
        ),
        ("an analysis is not charged", LEDGER, '        self._charge("analysis", self._analysis, number)\n', ""),
        (
            "an analysis is charged as a step would be",
            ACCOUNTING,
            'self._charge("analysis", self._analysis, number)',
            'self._charge("analysis", self.plan, number)',
        ),
        (
            "steps beyond the plan reach the ledger",
            LEDGER,
            "if self.steps_taken >= self.plan.steps:",
            "if self.steps_taken > self.plan.steps:",
            f"{_PRIVATE}::test_steps_beyond_the_plan_and_epochs_without_a_step_are_refused",
        ),
        (
            "a batch of the user's own is taken",
            SAMPLING,
            "if batch is not self._drawn:",
            "if self._drawn is None:",
            f"{_PRIVATE}::test_only_the_batch_just_drawn_can_be_used_and_only_once",
        ),
        (
            "a batch can be used twice",
            SAMPLING,
            '        self._drawn = None\n        self._charge("train"',
            '        self._charge("train"',
            f"{_PRIVATE}::test_only_the_batch_just_drawn_can_be_used_and_only_once",
        ),
        (
            "a batch may be drawn and skipped",
            SAMPLING,
            "                self._refuse_what_was_skipped()\n                self._drawn",
            "                self._drawn",
            f"{_PRIVATE}::test_a_batch_that_is_drawn_and_skipped_is_refused",
        ),
        (
            "an epoch may end with a batch that was skipped",
            SAMPLING,
            "                self._refuse_what_was_skipped()\n                taken = self.steps_taken",
            "                taken = self.steps_taken",
            f"{_PRIVATE}::test_a_batch_that_is_drawn_and_skipped_is_refused",
        ),
        (
            "an analysis draws from the stream of training",
            SAMPLING,
            'self._draw("analysis", self._analysis, number)',
            'self._draw("train", self._analysis, number)',
        ),
        (
            "an analysis draws at the rate of training",
            SAMPLING,
            'self._draw("analysis", self._analysis, number)',
            'self._draw("analysis", self.plan, number)',
        ),
        (
            "the rate follows from the true number of records",
            SAMPLING,
            "sampler, planned.sample_rate, stream",
            "sampler, planned.expected_batch_size / len(self._records), stream",
        ),
        ("every draw has the same attempt number", SAMPLING, "attempt = self._state.draws\n", "attempt = 1\n"),
        (
            "draws for records follow from the public seed",
            SECRET,
            "return step_key(self._mechanism.record_key, step)",
            "return step_key(self._seed, step)",
        ),
        (
            "all steps round alike",
            SECRET,
            "return step_key(self._mechanism.record_key, step)",
            "return step_key(self._mechanism.record_key, 0)",
        ),
        (
            "analyses round by the public seed",
            SECRET,
            "analysis_keys(self._mechanism.record_key, batch.step,",
            "analysis_keys(self._seed, batch.step,",
        ),
        (
            "all analyses round alike",
            SECRET,
            "analysis_keys(self._mechanism.record_key, batch.step,",
            "analysis_keys(self._mechanism.record_key, 0,",
        ),
        (
            "an analysis' records are read by the public seed",
            SECRET,
            'key = derive_key(self._mechanism.record_key, "analysis", batch.step)',
            'key = derive_key(self._seed, "analysis", batch.step)',
        ),
        (
            "a record on which the model raises ends the step",
            LEAK,
            "key, leaves_out=True,",
            "key, leaves_out=False,",
            f"{_ATTACKS}::test_a_broken_record_contributes_nothing_and_nothing_is_said",
        ),
        (
            "nobody looks whether real records are coupled",
            COUPLING,
            "        self._stop_if(first_reason(self.group, lambda: self._watch.coupling(mine, key)))\n",
            "",
            (
                "tests/invariants/test_calls.py::test_a_coupling_that_only_real_records_sho"
                "w_stops_the_run_in_its_first_epoch"
            ),
        ),
        (
            "a buffer that has taken in data stays as it is after an epoch",
            LEAK,
            "            self._stop_if(changed := self._watch.changed_buffer())\n",
            "            changed = None\n",
            f"{_ATTACKS}::test_a_buffer_that_begins_to_follow_the_data_stops_the_run_and_is_restored",
        ),
        (
            "a buffer that has taken in data is saved",
            LEAK,
            (
                "        self._stop_if(self._watch.changed_buffer())\n"
                "        self._refuse_if_broken()\n        self._parts"
            ),
            "        self._refuse_if_broken()\n        self._parts",
            "tests/invariants/test_interference.py::test_a_buffer_that_takes_in_the_data_ends_the_run_and_is_not_kept",
        ),
        (
            "a run that was stopped goes on",
            COUPLING,
            "    def _refuse_if_broken(self) -> None:\n",
            "    def _refuse_if_broken(self) -> None:\n        return\n\n    def _say_why(self) -> None:\n",
            (
                "tests/invariants/test_calls.py::test_a_coupling_that_only_real_records_sho"
                "w_stops_the_run_in_its_first_epoch"
            ),
        ),
        (
            "the analyses are not among a run's events",
            CLAIM,
            "return self._mechanism.ledger.events()",
            'return [one for one in self._mechanism.ledger.events() if one.kind == "train"]',
        ),
        (
            "the statement is of the plan and not of the ledger",
            CLAIM,
            "            events=self.events(),\n            secure=self.secure,\n",
            "            secure=self.secure,\n",
            f"{_CALLS}::test_the_statement_is_about_what_was_charged",
        ),
        (
            "the statement of a seeded run says that it is private",
            CLAIM,
            "            secure=self.secure,\n            num_values",
            "            num_values",
        ),
        (
            "the statement of a run that was stopped still holds",
            CLAIM,
            'return f"DOES NOT HOLD: {self._state.broken}\\n{statement}" if self._state.broken else statement',
            "return statement",
            (
                "tests/invariants/test_calls.py::test_a_coupling_that_only_real_records_sho"
                "w_stops_the_run_in_its_first_epoch"
            ),
        ),
        (
            "a run that has drawn a batch goes back to a checkpoint",
            RESUME,
            "        if self._began:\n",
            "        if False:\n",
            f"{_CONTINUING}::test_a_run_that_has_drawn_a_batch_loads_nothing",
        ),
        (
            "an analysis is made in every epoch",
            ANALYSIS,
            "due = sum(epoch <= index for epoch in self.plan.analysis_epochs())",
            "due = index + 1",
        ),
        (
            "values are replaced while a drawn batch is left",
            SAMPLING,
            "        self._refuse_what_was_skipped()\n        self._stop_if(self._watch.replace(state_dict))\n",
            "        self._stop_if(self._watch.replace(state_dict))\n",
            _REPLACING,
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/ahead.py",
        f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        (
            "a microbatch that is made ahead is left out",
            WIRING,
            "                item = coming.popleft().result()\n",
            "                item = coming.popleft().result()\n                coming and next(todo, None)\n",
            "tests/training/test_ahead.py",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/sums.py",
        f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        (
            "gradients are clipped to twice the planned norm",
            SENSITIVITY,
            "clipped_sum_of(objective, pieces, max_grad_norm=norm",
            "clipped_sum_of(objective, pieces, max_grad_norm=2 * norm",
        ),
        (
            "noise is asked for without a step",
            NOISE,
            'of_step = {"stream": "train", "step": batch.step, "attempt": batch.attempt}',
            'of_step = {"stream": "train", "step": 0, "attempt": batch.attempt}',
        ),
        (
            "noise is asked for without an attempt",
            NOISE,
            'of_step = {"stream": "train", "step": batch.step, "attempt": batch.attempt}',
            'of_step = {"stream": "train", "step": batch.step, "attempt": 0}',
        ),
        (
            "noise is asked for from the stream of analyses",
            NOISE,
            'of_step = {"stream": "train", "step": batch.step, "attempt": batch.attempt}',
            'of_step = {"stream": "analysis", "step": batch.step, "attempt": batch.attempt}',
        ),
        (
            "noise is asked for a clipping norm of one",
            NOISE,
            "plan.train_noise_std(plan.max_grad_norm)",
            "plan.train_noise_std(1.0)",
        ),
        (
            "noise of impacts is that of training",
            NOISE,
            "plan.analysis_noise_std(measured.sensitivity)",
            "plan.train_noise_std(measured.sensitivity)",
        ),
        (
            "noise of impacts is not scaled by their sensitivity",
            NOISE,
            "plan.analysis_noise_std(measured.sensitivity)",
            "plan.analysis_noise_std(1.0)",
        ),
        (
            "all analyses get the same noise",
            NOISE,
            'purpose = {"stream": "analysis", "step": batch.step, "attempt": batch.attempt, "name": "impacts"}',
            'purpose = {"stream": "analysis", "step": 0, "attempt": 0, "name": "impacts"}',
        ),
        (
            "noise of impacts comes from the stream of training",
            NOISE,
            'purpose = {"stream": "analysis", "step": batch.step, "attempt": batch.attempt, "name": "impacts"}',
            'purpose = {"stream": "train", "step": batch.step, "attempt": batch.attempt, "name": "impacts"}',
        ),
        (
            "gradients in integers are clipped to twice the planned norm",
            SENSITIVITY,
            "max_grad_norm=norm, grid=grid",
            "max_grad_norm=2 * norm, grid=grid",
            _POROSITY,
        ),
        (
            "the grid of a sum is that of half of its noise",
            NOISE,
            "grid = plan.grid(plan.train_noise_std(norm))",
            "grid = plan.grid(plan.train_noise_std(0.5 * norm))",
            _POROSITY,
        ),
        (
            "what is released leaves the grid",
            NOISE,
            "noisy.double().mul_(grid / expected)",
            "noisy.float().mul_(grid / expected)",
            _POROSITY,
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/impact.py",
        _IMPACT,
        (
            "impacts are added without being clipped",
            SENSITIVITY,
            "factors_B.mul(finite_B).double() @",
            "finite_B.double() @",
            f"{_IMPACT}::test_one_record_moves_the_sum_by_at_most_its_sensitivity",
        ),
        (
            "an impact that is not finite spoils the sum",
            ANALYSIS,
            "rows_or_zero(finite_B, v_BP)",
            "v_BP",
            f"{_IMPACT}::test_an_example_that_is_not_finite_contributes_nothing",
        ),
        (
            "copies that fill up a microbatch count",
            ANALYSIS,
            "            finite_B[piece.num_examples :] = False\n",
            "",
        ),
        (
            "all analyses have the same keys",
            SECRET,
            'derive_key(seed, "analysis", step, repeat)',
            'derive_key(seed, "analysis", repeat)',
            f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        ),
        (
            "the model stays in evaluation mode",
            ANALYSIS,
            "    with left_as_it_was(model):\n        model.eval()\n        yield",
            "    model.eval()\n    yield",
            f"{_IMPACT}::test_everything_else_is_left_bitwise_as_it_was",
        ),
        (
            "losses are computed under the global random stream",
            ANALYSIS,
            "        with seeded(key):\n            return drawing",
            "        if key >= 0:\n            return drawing",
            f"{_IMPACT}::test_a_model_that_draws_random_numbers_disturbs_no_global_stream",
        ),
        (
            "a record on which the model raises ends the analysis",
            LEAK,
            "        if not caused_by_records(error):\n            raise\n    rows = []",
            "        raise\n    rows = []",
            f"{_IMPACT}::test_an_example_on_which_the_loss_raises_contributes_nothing",
        ),
        (
            "the sensitivity of impacts is said to be one",
            SENSITIVITY,
            "sensitivity=float(max_norm), grid=grid)",
            "sensitivity=1.0, grid=grid)",
            f"{_IMPACT}::test_one_record_moves_the_sum_by_at_most_its_sensitivity",
        ),
        (
            "impacts are measured with dropout",
            ANALYSIS,
            "        model.eval()\n",
            "",
            f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        ),
        (
            "the sum of impacts is clipped instead of each",
            SENSITIVITY,
            "            clipped = factors_B.mul(finite_B).double() @ rows_or_zero(finite_B, v_BP)\n",
            (
                "            clipped = finite_B.double() @ rows_or_zero(finite_B, v_BP)\n"
                "            clipped = clipped * min(1.0, max_norm / max(float(clipped.norm()), 1e-30))\n"
            ),
            f"{_IMPACT}::test_the_sum_is_that_of_full_forward_passes",
        ),
        (
            "impacts in integers are clipped to twice the norm",
            SENSITIVITY,
            "grid_factors(v_BP.square().sum(1), max_norm, grid)",
            "grid_factors(v_BP.square().sum(1), 2 * max_norm, grid)",
            _POROSITY,
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/records.py",
        _RECORDS,
        ("a record that cannot be read ends the run", LEAK, "            return _Broken()\n", "            raise\n"),
        (
            "texts of all lengths share a microbatch",
            COUPLING,
            "        return [record_ids[groups == group] for group in groups.unique()]\n",
            "        return [record_ids]\n",
            "tests/data/test_texts.py::test_a_long_companion_changes_no_record_s_shape",
        ),
        (
            "groups that name no lengths count as none",
            COUPLING,
            'if hasattr(self._data_set, "dpquant_groups") and not',
            'if hasattr(self._data_set, "dpquant_groups") and None is not None and not',
            "tests/training/test_rehearsal.py::test_groups_without_their_lengths_are_refused",
        ),
        ("a record of another form is taken", COUPLING, "return matches(self._specimens.form, record)", "return True"),
        (
            "all records draw the same random numbers",
            COUPLING,
            "self._with_draws_of_its_own(index, derive_key(key, index))",
            "self._with_draws_of_its_own(index, derive_key(key, 0))",
        ),
        (
            "records draw by their place in the batch",
            COUPLING,
            "[self._with_draws_of_its_own(index, derive_key(key, index)) for index in indices]",
            "[self._with_draws_of_its_own(index, derive_key(key, place)) for place, index in enumerate(indices)]",
        ),
        (
            "ids are not those of the rows that are left",
            COUPLING,
            "Microbatch(batch, _filled(record_ids[kept], size), len(kept))",
            "Microbatch(batch, _filled(record_ids[: len(kept)], size), len(kept))",
        ),
        (
            "copies that fill up a microbatch count",
            SENSITIVITY,
            "Microbatch(batch, _filled(record_ids[kept], size), len(kept))",
            "Microbatch(batch, _filled(record_ids[kept], size), size)",
        ),
        (
            "copies count where a data set collates by itself",
            SENSITIVITY,
            "self._checked(self._data_set.dpquant_batch(self._own(ids)), size), ids, len(record_ids))",
            "self._checked(self._data_set.dpquant_batch(self._own(ids)), size), ids, size)",
        ),
        ("rows of a batch are not counted", COUPLING, "        check_rows(batch, count)\n", ""),
        (
            "a collate function that compares records is believed",
            COUPLING,
            '        if batch is None:\n            raise DataError(\n                "Expected collate_fn to collate',
            (
                "        if batch is None:\n            return None\n"
                "        if batch is False:\n            raise DataError(\n"
                '                "Expected collate_fn to collate'
            ),
        ),
        (
            "data sets draw from the global random stream",
            SECRET,
            '        key = derive_key(key, "read")\n        with seeded(key):\n',
            '        key = derive_key(key, "read")\n        if key >= 0:\n',
        ),
        (
            "collate functions draw from the global random stream",
            SECRET,
            '        key = derive_key(key, "collate")\n        with seeded(key):\n',
            '        key = derive_key(key, "collate")\n        if key >= 0:\n',
        ),
        (
            "the record that is probed is compared with itself",
            COUPLING,
            "return piece, Microbatch(self._collate_at(together, ids, key), ids, 1)",
            "return piece, piece",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/moved.py",
        "tests/training/test_moved.py",
        (
            "a frozen parameter may move",
            CLAIM,
            "        if not torch.equal(_checksum(now[name]), checksum):\n",
            "        if False:\n",
            "tests/training/test_moved.py::test_a_frozen_parameter_that_moves_is_named",
        ),
        (
            "a trainable parameter may stay",
            WIRING,
            "        if name not in may_stay:\n",
            "        if False:\n",
            "tests/training/test_moved.py::test_a_run_stops_at_its_first_step",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/watch.py",
        _ATTACKS,
        (
            "replacing values excuses a buffer that has taken in records",
            COUPLING,
            "        if reason := self.changed_buffer():\n            return reason\n",
            "",
            _REPLACING,
        ),
        (
            "values of another model are taken over as far as they fit",
            WIRING,
            "        check_tensors(self._objective.model.state_dict(), state_dict)\n",
            "",
            _REPLACING,
        ),
        (
            "an error of a step shows what the model said",
            LEAK,
            "failed, memory = type(error).__name__, out_of_memory(error)",
            'failed, memory = f"{type(error).__name__}: {error}", out_of_memory(error)',
            f"{_CALLS}::test_an_error_in_a_step_carries_nothing_of_a_record",
        ),
        (
            "an error of a step carries the model's own along",
            LEAK,
            "    except Exception as error:\n        failed, memory = type(error).__name__, out_of_memory(error)\n",
            (
                "    except Exception as error:\n        failed, memory = type(error).__name__, out_of_memory(error)\n"
                "        if not memory:\n            raise ModelError(failed) from error\n"
            ),
            f"{_CALLS}::test_an_error_in_a_step_carries_nothing_of_a_record",
        ),
        (
            "a coupling of real records is found and not said",
            COUPLING,
            'return "" if apart else "one record\'s gradient',
            'return "" if apart or True else "one record\'s gradient',
            f"{_CALLS}::test_a_coupling_that_only_real_records_show_stops_the_run_in_its_first_epoch",
        ),
        (
            "a buffer that has taken in data is not restored",
            LEAK,
            "        restore_buffers(self._objective.model, self._buffers)\n",
            "",
            f"{_ATTACKS}::test_a_buffer_that_begins_to_follow_the_data_stops_the_run_and_is_restored",
        ),
        (
            "an error of ours tells how long a record is",
            LEAK,
            'refused = type(error)(_SHAPE.sub("(withheld)", str(error)))',
            "refused = type(error)(str(error))",
            "tests/training/test_watch.py",
        ),
        (
            "an error of ours carries along what caused it",
            LEAK,
            'refused = type(error)(_SHAPE.sub("(withheld)", str(error)))\n',
            (
                'refused = type(error)(_SHAPE.sub("(withheld)", str(error)))\n'
                "        refused.__cause__ = error.__cause__\n"
            ),
            "tests/training/test_watch.py",
        ),
        (
            "warnings of a step are shown",
            LEAK,
            'warnings.simplefilter("ignore")',
            'warnings.simplefilter("default")',
            "tests/training/test_watch.py",
        ),
        (
            "records are compared in the first epoch alone",
            COUPLING,
            ('        """Compare one more record."""\n        self._probed = False\n'),
            '        """Compare one more record."""\n',
            "tests/training/test_watch.py",
        ),
        (
            "a record on which the model raises ends the run when it is compared",
            LEAK,
            (
                "        except Exception:  # the model does not run on this record, which then contributes nothing\n"
                '            return ""\n'
            ),
            ('        except ZeroDivisionError:\n            return ""\n'),
            "tests/training/test_watch.py",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/checkpoint.py",
        _CHECKPOINT,
        (
            "files are not on disk when the folder gets its name",
            CHECKPOINT,
            "                disk.flush(draft / name)\n",
            "",
            "tests/invariants/test_crashes.py",
        ),
        (
            "names of files are not on disk when the folder gets its name",
            CHECKPOINT,
            "            disk.flush(draft)\n",
            "",
            "tests/invariants/test_crashes.py",
        ),
        (
            "the name of the folder is not on disk when writing ends",
            CHECKPOINT,
            "            disk.flush(folder.parent)\n",
            "",
            "tests/invariants/test_crashes.py",
        ),
        (
            "flushing a file does nothing",
            CHECKPOINT,
            "            DISK.sync(file.fileno())\n",
            "            pass\n",
            "tests/invariants/test_crashes.py",
        ),
        (
            "files are written where they are read",
            CHECKPOINT,
            'draft = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")',
            "draft = folder",
            f"{_CHECKPOINT}::test_after_a_crash_at_any_operation_the_newest_checkpoint_is_whole",
        ),
        (
            "files that were changed are believed",
            CHECKPOINT,
            "            if _seal(files[name]) != seal:\n",
            "            if False:\n",
            f"{_CHECKPOINT}::test_a_changed_bit_is_found",
        ),
        (
            "a file is known by its length alone",
            CHECKPOINT,
            'return {"bytes": len(content), "sha256": _hash(content)}',
            'return {"bytes": len(content)}',
            f"{_CHECKPOINT}::test_a_changed_bit_is_found",
        ),
        (
            "a manifest that was changed is believed",
            CHECKPOINT,
            "        if seal != _hash(_json(manifest)):\n",
            "        if False:\n",
            f"{_CHECKPOINT}::test_a_changed_bit_is_found",
        ),
        (
            "another format is read",
            CHECKPOINT,
            '        if manifest["format"] != _FORMAT:\n',
            "        if False:\n",
            f"{_CHECKPOINT}::test_a_foreign_manifest_is_refused",
        ),
        (
            "a manifest may name files elsewhere",
            CHECKPOINT,
            "if Path(name).name != name or not path.is_file():",
            "if not path.is_file():",
            f"{_CHECKPOINT}::test_a_manifest_that_names_a_file_elsewhere_is_refused",
        ),
        (
            "a pickle is loaded",
            CHECKPOINT,
            "load(content) for name, content in files.items()}",
            (
                '(__import__("pickle").loads(content) if content[:1] == b"\\x80" else '
                "load(content)) for name, content in files.items()}"
            ),
            f"{_CHECKPOINT}::test_a_pickle_is_never_loaded",
        ),
        (
            "the oldest checkpoint is taken",
            RESUME,
            (
                "    for folder in sorted(_candidates(home), reverse=True):\n        try:\n"
                "            Checkpoint.read(folder)\n        except"
            ),
            (
                "    for folder in sorted(_candidates(home)):\n        try:\n"
                "            Checkpoint.read(folder)\n        except"
            ),
            f"{_CHECKPOINT}::test_the_checkpoint_before_a_broken_one_is_taken_and_it_is_said",
        ),
        (
            "a broken checkpoint counts among those that are kept",
            CHECKPOINT,
            "            Checkpoint.read(folder)\n            sound += 1\n        except",
            "            sound += 1\n            Checkpoint.read(folder)\n        except",
            f"{_CHECKPOINT}::test_the_newest_two_sound_ones_are_kept",
        ),
        (
            "a draft is taken for a checkpoint",
            CHECKPOINT,
            ' and ".tmp-" not in folder.name]',
            "]",
            f"{_CHECKPOINT}::test_the_checkpoint_before_a_broken_one_is_taken_and_it_is_said",
        ),
        (
            "a draft is left behind when the disk is full",
            CHECKPOINT,
            "            disk.remove(draft)\n            raise\n",
            "            raise\n",
            f"{_CHECKPOINT}::test_a_full_disk_leaves_nothing",
        ),
        (
            "a tensor that occurs twice is saved as another",
            CHECKPOINT,
            "same = (value.data_ptr(), value.dtype, value.shape, value.stride())",
            "same = (value.dtype, value.shape)",
            f"{_CHECKPOINT}::test_what_was_written_is_read",
        ),
        (
            "an object that only pickle could save is left out",
            CHECKPOINT,
            '            raise SettingError(\n                f"Expected {path} to hold tensors,',
            (
                "            return None\n            raise SettingError(\n"
                '                f"Expected {path} to hold tensors,'
            ),
            f"{_CHECKPOINT}::test_what_only_pickle_could_save_is_refused",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/continuing.py",
        _CONTINUING,
        (
            "what is charged already is not charged again, in a private run either",
            RESUME,
            "if not mechanism.repeats or number >= mechanism.ledger.charged(kind):",
            "if number >= mechanism.ledger.charged(kind):",
            f"{_CONTINUING}::test_lost_steps_are_not_taken_again",
        ),
        (
            "a ledger with fewer steps than the checkpoint is taken",
            RESUME,
            "if steps < saved.steps_taken or analyses < saved.analyses_made:",
            "if analyses < saved.analyses_made:",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
        (
            "a ledger with fewer analyses than the checkpoint is taken",
            RESUME,
            "if steps < saved.steps_taken or analyses < saved.analyses_made:",
            "if steps < saved.steps_taken:",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
        (
            "steps that were lost are taken again",
            RESUME,
            "saved, steps_taken=steps,",
            "saved, steps_taken=saved.steps_taken,",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
        (
            "an analysis that was lost is made again",
            RESUME,
            "analyses_made=analyses,",
            "analyses_made=saved.analyses_made,",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
        (
            "a private run repeats what was lost",
            RESUME,
            "    if repeatable:\n",
            "    if True:\n",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
        (
            "a checkpoint of another plan is loaded",
            RESUME,
            'if checkpoint.facts.get("plan") != self.plan.to_json():',
            "if False:",
            f"{_CONTINUING}::test_a_checkpoint_of_another_plan_is_refused",
        ),
        (
            "what is not named is not loaded and nothing is said",
            RESUME,
            "        if names != saved:\n",
            "        if names - saved:\n",
            f"{_CONTINUING}::test_what_was_saved_must_be_loaded",
        ),
        (
            "a checkpoint of another model is loaded as far as it goes",
            RESUME,
            '        check_tensors(self.model.state_dict(), checkpoint.parts["model"])\n',
            "",
            f"{_CONTINUING}::test_another_model_is_refused",
        ),
        (
            "the optimizer's state is not loaded",
            RESUME,
            '{"model": self.model, "optimizer": self.optimizer, **self.others}.items()',
            '{"model": self.model, **self.others}.items()',
            f"{_CONTINUING}::test_a_repeatable_run_continues_with_the_same_bits",
        ),
        (
            "the number of draws is forgotten",
            RESUME,
            "draws=saved.draws + lost",
            "draws=0",
            f"{_CONTINUING}::test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/state.py",
        "tests/training/test_state.py",
        (
            "a run that was stopped goes on after a restart",
            RESUME,
            '"policies": policies})',
            '"policies": policies, "broken": ""})',
        ),
        ("scores are forgotten at a restart", RESUME, '"policies": policies})', '"policies": policies, "scores": {}})'),
        (
            "a state of another format is read",
            RESUME,
            'if read.pop("format") != _FORMAT:',
            'if not read.pop("format"):',
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/start.py",
        _PRIVATE,
        (
            "the run's key follows from the public seed",
            SECRET,
            "SecretKey() if mechanism_seed is None else SecretKey.from_seed(mechanism_seed)",
            "SecretKey.from_seed(seed if mechanism_seed is None else mechanism_seed)",
            f"{_PRIVATE}::test_two_runs_differ_unless_the_mechanism_is_seeded_which_is_said",
        ),
        (
            "the ledger knows no budget",
            LEDGER,
            '"budget": plan.budget(),',
            '"budget": None,',
            f"{_CONTINUING}::test_lost_steps_are_not_taken_again",
        ),
        (
            "a run goes on in a ledger without being asked to",
            LEDGER,
            "if resume and ledger is not None and ledger.exists():",
            "if ledger is not None and ledger.exists():",
            f"{_CONTINUING}::test_a_ledger_in_use_is_not_continued_by_accident",
        ),
        (
            "an analysis that was charged is forgotten where no step was",
            RESUME,
            'if mechanism.ledger.charged("train") or mechanism.ledger.charged("analysis"):',
            'if mechanism.ledger.charged("train"):',
            f"{_CONTINUING}::test_an_analysis_that_was_charged_before_any_step_is_not_made_again",
        ),
        (
            "the step is rehearsed on private records",
            LEAK,
            "    setup = Setup(\n        optimizer=request.optimizer,",
            (
                "    real = from_examples(_first_records(train_set), request.collate_fn, device)\n"
                "    found = dataclasses.replace(found, specimens=real)\n"
                "    setup = Setup(\n        optimizer=request.optimizer,"
            ),
            f"{_CALLS}::test_no_value_of_a_private_record_is_used_before_a_charge",
        ),
        (
            "the ledger is opened before anything is checked",
            LEDGER,
            "    with current(device):\n        partition =",
            "    mechanism = make_mechanism(0.0)\n    with current(device):\n        partition =",
            f"{_PRIVATE}::test_bad_input_is_refused_before_any_work",
        ),
        (
            "records of another form than the synthetic ones are not noticed",
            COUPLING,
            "    records.check()\n",
            "",
            f"{_CALLS}::test_examples_of_another_form_than_the_records_are_refused_before_a_charge",
        ),
        (
            "modules that couple examples are not refused by name",
            COUPLING,
            "    check_trainable(model)\n",
            "",
            f"{_PRIVATE}::test_bad_input_is_refused_before_any_work",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/auto_format.py",
        _AUTO,
        (
            "auto quantizes layers that get slower",
            WIRING,
            "if gains.get(name, 0.0) >= LEAST_GAIN)",
            "if name in gains)",
        ),
        (
            "auto counts on units that the backend refuses",
            WIRING,
            "            if reason is None:\n",
            "            if reason is not None:\n",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/execution.py",
        _AUTO,
        (
            "auto names a format in which no layer ran",
            CLAIM,
            "chosen=FULL_PRECISION if auto and excluded == tuple(macs) else chosen,",
            "chosen=chosen,",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/private.py",
        f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        (
            "microbatches are as large as the batch that was drawn",
            SENSITIVITY,
            "self._objective.trainable(), self.execution.microbatch_size",
            "self._objective.trainable(), max(len(batch.record_ids), 1)",
        ),
        (
            "microbatches of an analysis are as large as what was drawn",
            SENSITIVITY,
            "        size = self.execution.analysis_microbatch_size\n",
            "        size = max(len(batch.record_ids), 1)\n",
        ),
        (
            "parameters of the processes are never compared",
            WIRING,
            "        check_parameters(self.group, self.model)\n        self._refuse_if_broken()\n",
            "        self._refuse_if_broken()\n",
            f"{_TWO}::test_a_process_whose_parameters_are_changed_stops_all",
        ),
        (
            "an error on one process is not told",
            WIRING,
            "clipped = together(self.group, lambda: self._clipped_sum(self._pieces(batch, size, key), key))",
            "clipped = self._clipped_sum(self._pieces(batch, size, key), key)",
            f"{_TWO}::test_a_failure_on_one_process_is_one_on_all",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/sums.py",
        f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        (
            "the sum is divided by a thousand more than is planned",
            SENSITIVITY,
            "total, grid=clipped.grid, expected=plan.expected_batch_size).float()",
            "total, grid=clipped.grid, expected=plan.expected_batch_size + 1000).float()",
        ),
        (
            "no noise is added to the sum",
            NOISE,
            "return noisy_mean(noise, total, grid=clipped.grid",
            "return noisy_mean(noise.zero_(), total, grid=clipped.grid",
        ),
        (
            "impacts are used without noise",
            NOISE,
            "noisy_mean(noise[part], total",
            "noisy_mean(noise[part].zero_(), total",
        ),
        (
            "impacts are divided by a training step's batch size",
            SENSITIVITY,
            "expected = plan.analysis.expected_batch_size",
            "expected = plan.expected_batch_size",
        ),
        (
            "a sum of another sensitivity than the noise is for is noised",
            SENSITIVITY,
            "if clipped.sensitivity != plan.max_grad_norm:",
            "if False:",
            f"{_CALLS}::test_a_sum_of_another_sensitivity_is_not_noised",
        ),
        (
            "impacts are clipped to twice the planned norm",
            ANALYSIS,
            "max_norm=analysis.max_norm, keys=keys",
            "max_norm=2 * analysis.max_norm, keys=keys",
        ),
        (
            "the grid of impacts is that of training",
            ANALYSIS,
            "    grid = plan.grid(plan.analysis_noise_std(analysis.max_norm))\n",
            "    grid = plan.grid(plan.train_noise_std(plan.max_grad_norm))\n",
            _POROSITY,
        ),
        (
            "all parameters ask for the same noise",
            NOISE,
            "**of_step, name=name, part=part)",
            '**of_step, name="w", part=part)',
        ),
        (
            "every process draws the noise of the first one's slice",
            NOISE,
            "name=name, part=part)",
            "name=name, part=slice(0, part.stop - part.start))",
            f"{_TWO}::test_noise_is_one_unit_whatever_the_number_of_processes",
        ),
        (
            "integers of exact sums are taken for gradients",
            SENSITIVITY,
            "        total, grid = total.double().mul_(grid).to(noise.dtype), None\n",
            "        total, grid = total.to(noise.dtype), None\n",
            f"{_EXACT}::test_an_exact_run_is_an_ordinary_one_up_to_round_off",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/exchange.py",
        f"{_TWO}::test_several_processes_compute_what_one_does",
        (
            "every process takes the whole batch",
            SENSITIVITY,
            "return record_ids.tensor_split(group.size)[group.rank]",
            "return record_ids",
        ),
        (
            "shares overlap by a record",
            SENSITIVITY,
            "return share(record_ids, group), slice(None)",
            "return torch.cat([share(record_ids, group), record_ids[:1]]), slice(None)",
        ),
        (
            "each process takes the microbatches from its own on",
            SENSITIVITY,
            "slice(group.rank, None, group.size)",
            "slice(group.rank, None)",
            f"{_TWO}::test_with_exact_sums_any_number_has_the_bits_of_one",
        ),
        (
            "processes do not add up their sums",
            WIRING,
            "        for one in others:\n            added += one\n",
            "",
        ),
        (
            "of a long slice only the last piece is kept, in the place of the first",
            WIRING,
            "        place.copy_(added)\n",
            "        total[: len(added)].copy_(added)\n",
            f"{_TWO}::test_sums_of_more_values_than_are_added_up_at_a_time_are_those_of_each",
        ),
        (
            "noise is added on every process, and then added up",
            NOISE,
            "    done = [noised(name, parts[name], total) for name, total in own.items()]\n",
            "    done = [sum(noised(name, parts[name], total / 2) for _ in range(2)) for name, total in own.items()]\n",
            f"{_TWO}::test_noise_is_one_unit_whatever_the_number_of_processes",
        ),
        (
            "noise is added on no process",
            NOISE,
            "    done = [noised(name, parts[name], total) for name, total in own.items()]\n",
            "    noises = {name: noised(name, parts[name], torch.zeros_like(total)) for name, total in own.items()}\n"
            "    done = [noised(name, parts[name], total) - noises[name] for name, total in own.items()]\n",
            f"{_TWO}::test_noise_is_one_unit_whatever_the_number_of_processes",
        ),
        (
            "slices overlap by a value",
            NOISE,
            "begin, end, place, found = self.rank * self.length, (self.rank + 1) * self.length, 0, {}",
            "begin, end, place, found = self.rank * self.length, (self.rank + 1) * self.length + 1, 0, {}",
            f"{_TWO}::test_slices_cover_every_value_once",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/steps.py",
        f"{_STEPS}::test_a_sharded_optimizer_has_the_bits_of_a_whole_one",
        (
            "gradients left from another step are added",
            WIRING,
            "            trainable[name].grad = mean\n",
            "            old = trainable[name].grad\n"
            "            trainable[name].grad = mean if old is None else mean + old\n",
            f"{_CALLS}::test_a_run_keeps_its_plan_call_by_call",
        ),
        (
            "a sharded optimizer steps with sums without noise",
            NOISE,
            "        self._gradient = own_means(self.group, sums, noised, torch.float32)\n",
            "        self._gradient = own_means(self.group, sums, lambda *a: noised(*a) * 0 + a[2], torch.float32)\n",
            f"{_STEPS}::test_noise_of_a_sharded_run_is_one_unit",
        ),
        (
            "a slice's state is that of the first slice",
            RESUME,
            "value.reshape(-1)[parts[name]].clone()",
            "value.reshape(-1)[: len(mine)].clone()",
            f"{_STEPS}::test_a_state_goes_on_on_any_number_of_processes",
        ),
        (
            "a state of another step is saved",
            CHECKPOINT,
            "        self._whole = None\n        self._cut_state()\n        self._read_parameters()\n",
            "        self._cut_state()\n        self._read_parameters()\n",
            f"{_STEPS}::test_a_gathered_state_is_not_saved_after_another_step",
        ),
        (
            "a slice goes on from its own former values",
            WIRING,
            "        self._cut_state()\n        self._read_parameters()\n        for",
            "        self._cut_state()\n        if not self._state:\n            self._read_parameters()\n        for",
            f"{_STEPS}::test_values_that_the_user_sets_between_steps_are_stepped_from",
        ),
        (
            "any optimizer is sharded",
            CLAIM,
            "    if type(optimizer) not in _ELEMENTWISE:\n",
            "    if False:\n",
            f"{_STEPS}::test_an_optimizer_that_may_see_its_slice_is_refused",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/shared_ledger.py",
        f"{_TWO}::test_where_the_ledger_fails_no_process_reads_a_record",
        (
            "the other processes are told before the charge is on disk",
            LEDGER,
            "        self._last = json.loads(on_first(self._group, charge_it))\n",
            "        self._last = json.loads(on_first(self._group, lambda: _facts(self._own) if self._own else b''))\n"
            "        if self._own is not None:\n"
            "            charge_it()\n",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/start.py",
        f"{_TWO}::test_the_first_ones_execution_and_choices_hold_for_all",
        (
            "each process decides for itself how it runs",
            WIRING,
            "answer = json.loads(on_first(group, measure))",
            "answer = json.loads(measure())",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/arguments.py",
        f"{_PRIVATE}::test_bad_input_is_refused_before_any_work",
        (
            "a parameter that the optimizer lacks is clipped for nothing",
            CLAIM,
            "p.requires_grad and p not in held]",
            "p.requires_grad and p not in names]",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/trial.py",
        f"{_CALLS}::test_a_coupling_at_the_runs_own_size_is_refused_before_a_charge",
        (
            "losses in a microbatch of the run's size are not compared",
            COUPLING,
            "        check_at_size(found, size)\n",
            "",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/execution.py",
        "tests/training/test_execution.py::test_records_in_groups_are_analysed_with_fewer_at_a_time",
        (
            "an analysis does not know of groups",
            WIRING,
            "groups=request.groups,\n            device",
            "groups=1,\n            device",
        ),
    ),
    *mutants_of(
        f"{_TRAINING}/rehearsal.py",
        "tests/training/test_rehearsal.py::test_a_model_that_cannot_read_the_shortest_records_is_refused_before_a_charge",
        (
            "records of the longest length alone are tried",
            WIRING,
            "    if len(setup.lengths) < 2:\n",
            "    if setup.lengths is not None:\n",
        ),
    ),
    *mutants_of(
        "src/dpquant/engine/exact_sum.py",
        f"{_EXACT}::test_a_record_moves_an_exact_sum_by_the_clipping_norm_at_most",
        (
            "nothing is left for the rounding of exact sums",
            SENSITIVITY,
            "max_grad_norm * (1 - _MARGIN)",
            "max_grad_norm",
            f"{_EXACT}::test_a_record_is_clipped_below_the_norm_by_the_margin",
        ),
        (
            "sums are rounded to a grid as coarse as a 32nd of the norm",
            SENSITIVITY,
            "    return math.ldexp(max_norm, -_BITS)\n",
            "    return math.ldexp(max_norm, -5)\n",
        ),
    ),
]
