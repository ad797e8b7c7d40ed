# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in `app`: what leaves a run by an export, a report or an evaluation, and to whom a run is shown."""

from mutants.mutant import CLAIM, LEAK, LEDGER, SECRET, mutants_of

_EXPORT = "tests/app/test_export.py"
_REPORT = "tests/app/test_report.py"
_WATCH = "tests/app/test_watch.py"
_EVALUATE = "tests/app/test_evaluate.py"
_MODEL_FILE = "tests/app/test_model_file.py"

MUTANTS = [
    *mutants_of(
        "src/dpquant/app/verify.py",
        f"{_REPORT}::test_what_was_edited_is_one_line_and_exit_code_1",
        (
            "an edited epsilon is believed",
            CLAIM,
            'yield _equal("epsilon", record.epsilon, accounting.epsilon(contents.events, record.delta), LEDGER)',
            'yield _equal("epsilon", record.epsilon, record.epsilon, LEDGER)',
        ),
        (
            "a ledger that was cut is believed",
            CLAIM,
            'yield _equal("ledger: head", record.ledger.head, contents.head, LEDGER)',
            'yield _equal("ledger: head", record.ledger.head, record.ledger.head, LEDGER)',
        ),
        (
            "other weights are believed",
            CLAIM,
            'yield _equal("model: SHA-256", record.model_sha256, sha256(run / MODEL), MODEL)',
            'yield _equal("model: SHA-256", record.model_sha256, record.model_sha256, MODEL)',
        ),
    ),
    *mutants_of(
        "src/dpquant/app/evaluate.py",
        f"{_EVALUATE}::test_a_release_depends_on_test_records_through_the_noisy_count_only",
        (
            "the accuracy of private test records is released without noise",
            LEAK,
            "count = noisy_count(count_right(model, split, task_of(description)), epsilon, key or SecretKey())",
            "count = count_right(model, split, task_of(description))",
            f"{_EVALUATE}::test_a_release_is_the_noisy_count_over_a_public_number",
        ),
        (
            "the noise of a release is that of twice its epsilon",
            LEAK,
            "task_of(description)), epsilon, key or SecretKey())",
            "task_of(description)), 2 * epsilon, key or SecretKey())",
            f"{_EVALUATE}::test_a_release_is_the_noisy_count_over_a_public_number",
        ),
        (
            "every release has the same noise",
            SECRET,
            "key or SecretKey())",
            'key or SecretKey(b"one key for all."))',
            f"{_EVALUATE}::test_the_noise_is_fresh",
        ),
        (
            "a noisy count is divided by the true number of test records",
            LEAK,
            "accuracy=min(max(count, 0), records) / records,",
            "accuracy=min(max(count, 0), records) / len(split),",
        ),
        (
            "the number of unreadable private test records is told",
            LEAK,
            "        protected=protected,\n    )",
            "        protected=protected,\n        unreadable=int((~split.readable).sum()),\n    )",
        ),
        (
            "a private test record that cannot be used is named",
            LEAK,
            "held_out(run, settings, description, data, strict=False)",
            "held_out(run, settings, description, data, strict=True)",
            f"{_EVALUATE}::test_a_strict_reading_names_a_row_and_a_private_one_does_not",
        ),
        (
            "private test records are used before their release is written down",
            LEDGER,
            "    past = releases.charge(run / RELEASES",
            "    count_right(model, split, task_of(description))\n    past = releases.charge(run / RELEASES",
            f"{_EVALUATE}::test_a_release_is_written_down_before_a_record_passes_the_model",
        ),
        (
            "a release whose noise came from a known seed is said to be private",
            CLAIM,
            "secure=key is None or key.secure",
            "secure=True",
            f"{_EVALUATE}::test_noise_of_a_known_seed_is_said_not_to_be_private",
        ),
        (
            "releases of the run's own test records are said to protect them",
            CLAIM,
            "own=data is None or data == settings.data",
            "own=False",
            f"{_EVALUATE}::test_a_release_of_the_run_s_own_test_records_says_that_they_were_not_protected_before",
        ),
    ),
    *mutants_of(
        "src/dpquant/app/model_file.py",
        f"{_MODEL_FILE}::test_the_statement_travels_in_the_file_and_beside_it_and_no_folder_does",
        (
            "a graph names the folders of the machine",
            LEAK,
            '_GRAPH_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack")',
            "_GRAPH_TRACES = ()",
        ),
        (
            "a file holds the folder of a pretrained network",
            LEAK,
            "dataclasses.replace(description, model=unplaced_model(description.model))",
            "dataclasses.replace(description)",
        ),
        (
            "a file that computes something else is written",
            CLAIM,
            "if not all(one <= _TOLERANCE * max(1.0, largest) for one in differences):",
            "if False:",
            f"{_MODEL_FILE}::test_a_file_that_computes_something_else_is_not_written",
        ),
        (
            "a file that computes no number is written",
            CLAIM,
            "if not all(one <= _TOLERANCE * max(1.0, largest) for one in differences):",
            "if any(one > _TOLERANCE * max(1.0, largest) for one in differences):",
            f"{_MODEL_FILE}::test_a_file_that_computes_something_else_is_not_written",
        ),
    ),
    *mutants_of(
        "src/dpquant/app/report.py",
        f"{_REPORT}::test_a_report_is_of_its_record_and_leaves_out_what_is_redacted",
        (
            "a redacted report that is made again is redacted no more",
            LEAK,
            "write(path, report(facts_of(run, redact=redacted)))",
            "write(path, report(facts_of(run)))",
            f"{_EVALUATE}::test_a_report_that_is_made_again_leaves_out_what_was_left_out",
        ),
        ("a redacted report holds the settings", LEAK, "if redact or not (run", "if not (run"),
    ),
    *mutants_of(
        "src/dpquant/app/spent.py",
        f"{_REPORT}::test_other_runs_add_up_and_two_states_of_one_run_both_count",
        ("only the last run counts", CLAIM, "        once[path] = contents\n", "        once = {path: contents}\n"),
    ),
    *mutants_of(
        "src/dpquant/app/export.py",
        _EXPORT,
        (
            "training accuracy is exported",
            LEAK,
            "nonprivate_accuracy_train=None)",
            "nonprivate_accuracy_train=epoch.nonprivate_accuracy_train)",
            f"{_EXPORT}::test_training_accuracy_is_not_exported",
        ),
        (
            "settings are exported with folders of the machine",
            LEAK,
            "CONFIG: _public(settings).to_toml(),",
            "CONFIG: settings.to_toml(),",
            f"{_EXPORT}::test_an_export_holds_what_is_released_with_its_sums",
        ),
        (
            "the command line is exported",
            LEAK,
            'command=f"dpquant train --config {CONFIG}",',
            "command=record.command,",
            f"{_EXPORT}::test_an_export_holds_what_is_released_with_its_sums",
        ),
        (
            "the folder of the records is exported",
            LEAK,
            'dataset=unplaced(record.dataset) or "",',
            "dataset=record.dataset,",
            f"{_EXPORT}::test_an_export_holds_what_is_released_with_its_sums",
        ),
        ("the lines of the ledger are exported", LEAK, "SPENT: _summary(spent),", "SPENT: _read(run / LEDGER),"),
        (
            "when steps were taken is exported",
            LEAK,
            "SPENT: _summary(spent),",
            "SPENT: _summary(spent), PROGRESS: _read(run / PROGRESS),",
            f"{_EXPORT}::test_an_export_holds_what_is_released_with_its_sums",
        ),
        (
            "how often processes began is exported",
            LEAK,
            ('    return json.dumps(facts, indent=2) + "\\n"\n\n\ndef _write('),
            (
                '    facts["attempts"] = contents.attempts\n'
                '    return json.dumps(facts, indent=2) + "\\n"\n'
                "\n"
                "\n"
                "def _write("
            ),
            f"{_EXPORT}::test_record_settings_and_ledger_of_an_export_say_what_the_run_said",
        ),
        (
            "a report that shows times is exported",
            LEAK,
            "if any(part in text for part in (NOT_FOR_RELEASE, html.escape(NOT_FOR_RELEASE))):",
            "if False:",
            f"{_EXPORT}::test_a_report_is_copied_unless_it_shows_what_is_the_operators",
        ),
        (
            "a report that names folders of the machine is exported",
            LEAK,
            "if any(part in text for one in withheld for part in (one, html.escape(one))):",
            "if False:",
            f"{_EXPORT}::test_a_report_is_copied_unless_it_shows_what_is_the_operators",
        ),
        (
            "a report that shows an evaluation is exported",
            LEAK,
            "if UNPROTECTED in text:",
            "if False:",
            f"{_EVALUATE}::test_an_evaluation_is_not_exported_nor_a_report_that_shows_it",
        ),
        (
            "a report that may show training accuracy is exported",
            LEAK,
            ("    if record.unsafe_metrics:\n        return"),
            ("    if False:\n        return"),
            f"{_EXPORT}::test_a_report_that_may_show_training_accuracy_is_left",
        ),
        (
            "a ledger that has charged more than the record says is exported",
            CLAIM,
            "if not spent.together.epsilon <= record.epsilon * (1 + _ROUND_OFF):",
            "if False:",
            f"{_EXPORT}::test_what_cannot_be_released_is_one_line_and_nothing_is_made",
        ),
        (
            "a run that has not ended is exported",
            CLAIM,
            ("    if not (run / RECORD).is_file():\n        raise SettingError("),
            ("    if False:\n        raise SettingError("),
            f"{_EXPORT}::test_what_cannot_be_released_is_one_line_and_nothing_is_made",
        ),
        (
            "what lies in the folder of an export is taken for released",
            LEAK,
            "if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):",
            "if folder.exists() and not folder.is_dir():",
            f"{_EXPORT}::test_what_cannot_be_released_is_one_line_and_nothing_is_made",
        ),
        (
            "an export that fails leaves what it had copied",
            LEAK,
            ("    except OSError as error:\n        shutil.rmtree(draft, ignore_errors=True)\n"),
            "    except OSError as error:\n",
            f"{_EXPORT}::test_an_export_that_fails_half_way_leaves_nothing",
        ),
    ),
    *mutants_of(
        "src/dpquant/app/watch.py",
        f"{_WATCH}::test_another_name_for_this_machine_is_refused",
        (
            "a page is served to every machine",
            LEAK,
            'ADDRESS = "127.0.0.1"',
            'ADDRESS = "0.0.0.0"',
            f"{_WATCH}::test_it_listens_on_this_machine_alone_and_each_server_has_its_own_token",
        ),
        ("a page is served under every name", LEAK, "return name in _OWN_NAMES and", "return bool(name) and"),
        ("the first of several names is believed", LEAK, "if len(hosts) == 1 else", "if hosts else"),
        (
            "a page is served without its token",
            LEAK,
            'return hmac.compare_digest(self.path.encode("utf-8", "surrogateescape"), path.encode())',
            'return path.rpartition("/")[2] == self.path.rpartition("/")[2]',
            f"{_WATCH}::test_another_path_is_not_found",
        ),
        (
            "a token can be guessed",
            LEAK,
            "secrets.token_urlsafe(24)",
            "secrets.token_urlsafe(3)",
            f"{_WATCH}::test_it_listens_on_this_machine_alone_and_each_server_has_its_own_token",
        ),
        (
            "all servers have one token",
            LEAK,
            "secrets.token_urlsafe(24)",
            '"x" * 32',
            f"{_WATCH}::test_it_listens_on_this_machine_alone_and_each_server_has_its_own_token",
        ),
        (
            "other methods are answered",
            LEAK,
            "self._refuse(http.HTTPStatus.METHOD_NOT_ALLOWED)",
            "self.do_GET()",
            f"{_WATCH}::test_other_methods_are_refused",
        ),
        (
            "the page may ask every address",
            LEAK,
            "connect-src 'self'; ",
            "connect-src *; ",
            f"{_WATCH}::test_the_page_may_ask_nobody_but_its_server_and_runs_no_script_but_its_own",
        ),
        (
            "all pages have one nonce",
            LEAK,
            "nonce, news = secrets.token_urlsafe(16),",
            'nonce, news = "n" * 22,',
            f"{_WATCH}::test_the_page_may_ask_nobody_but_its_server_and_runs_no_script_but_its_own",
        ),
    ),
    *mutants_of(
        "src/dpquant/app/doctor.py",
        "tests/app/test_doctor.py",
        ("a bug report names the user", LEAK, 'return f"~/{path.relative_to(home)}" if', "return str(path) if"),
    ),
]
