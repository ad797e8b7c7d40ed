# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in `engine` and `checks`: clipping, per-example gradients, random draws, and the checks before a run."""

from mutants.mutant import ANALYSIS, COUPLING, LEAK, SECRET, SENSITIVITY, WIRING, mutants_of

_ENGINE, _CHECKS = "src/dpquant/engine", "src/dpquant/checks"
_CLIP = "tests/engine/test_clip.py"
_CONTRIBUTIONS = "tests/engine/test_contributions.py"
_BOUNDED = f"{_CLIP}::test_quantized_or_not_the_sum_is_that_of_its_examples_and_each_is_at_most_c"
_LEAVES = "tests/engine/test_leaves.py"
_ARRANGED = "tests/engine/test_arrangement.py"
_LOOP = f"{_CLIP}::test_the_sum_is_that_of_a_loop_over_single_examples"
_DRAWS = f"{_CLIP}::test_a_record_that_leaves_moves_no_other_s_draws"
_COUPLINGS = "tests/checks/test_couplings.py"
_ISOLATION = "tests/checks/test_isolation.py"
_FROZEN = "tests/engine/test_frozen.py"
_POSITIONS = "tests/engine/test_positions.py"

MUTANTS = [
    *mutants_of(
        f"{_ENGINE}/clip.py",
        _CLIP,
        (
            "clip factors are rounded up",
            SENSITIVITY,
            ".clamp(max=1) * (1 - ROUND_OFF)",
            ".clamp(max=1) * (1 + ROUND_OFF)",
            f"{_CLIP}::test_a_clip_factor_never_rounds_up_however_small",
        ),
        (
            "clip factors are not rounded down",
            SENSITIVITY,
            ".clamp(max=1) * (1 - ROUND_OFF)",
            ".clamp(max=1)",
            f"{_CLIP}::test_long_rows_of_one_value_do_not_exceed_c",
        ),
        (
            "a norm that is infinite counts as finite",
            SENSITIVITY,
            "finite_B = squared_norms_B.isfinite()",
            "finite_B = ~squared_norms_B.isnan()",
            f"{_CLIP}::test_a_clip_factor_that_lets_nan_through_is_caught",
        ),
        (
            "a factor that float32 may double is used",
            SENSITIVITY,
            "(factors_B >= _SMALLEST_NORMAL)",
            "(factors_B >= 0)",
            f"{_CLIP}::test_a_clip_factor_never_rounds_up_however_small",
        ),
        (
            "an example that is not finite is multiplied by zero and added",
            SENSITIVITY,
            "    if not finite_B.all():\n",
            "    if False:\n",
            f"{_CLIP}::test_a_record_that_is_not_finite_contributes_nothing_and_a_huge_one_at_most_c",
        ),
        (
            "the norm leaves out the biases",
            SENSITIVITY,
            "tape.squared_norms(parts, size)",
            'tape.squared_norms({n: p for n, p in parts.items() if not n.endswith("bias")}, size)',
            _LOOP,
        ),
        (
            "every example is clipped to twice the norm",
            SENSITIVITY,
            "(max_grad_norm / norms_B)",
            "(2 * max_grad_norm / norms_B)",
            _LOOP,
        ),
        (
            "the sensitivity is said to be one",
            SENSITIVITY,
            "complete and found), sensitivity=float(max_grad_norm))",
            "complete and found), sensitivity=1.0)",
            _LOOP,
        ),
        (
            "all steps have the same draws",
            SECRET,
            'derive_key(seed, "step", step)',
            'derive_key(seed, "step")',
            f"{_CLIP}::test_norms_from_one_rounding_and_sums_from_another_would_exceed_c",
        ),
    ),
    *mutants_of(
        "src/dpquant/engine/grid_sum.py",
        "tests/invariants/test_porosity.py",
        (
            "contributions are rounded to the nearest integers",
            SENSITIVITY,
            "neginf=0.0).to(torch.int64)",
            "neginf=0.0).round_().to(torch.int64)",
        ),
        (
            "contributions in integers are clipped to twice the norm",
            SENSITIVITY,
            "tape.contributions(), kept, max_grad_norm, grid)",
            "tape.contributions(), kept, 2 * max_grad_norm, grid)",
        ),
        (
            "contributions in integers are not clipped",
            SENSITIVITY,
            "(max_norm / squared_norms_B.sqrt()).clamp(max=1) *",
            "torch.ones_like(squared_norms_B) *",
        ),
        (
            "integers are added as floats",
            SENSITIVITY,
            "torch.zeros(p.shape, dtype=torch.int64, device=p.device)",
            "torch.zeros(p.shape, dtype=torch.float32, device=p.device)",
        ),
        (
            "a gradient that is not finite becomes an integer",
            SENSITIVITY,
            "scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).to(",
            "scaled.to(",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/tape.py",
        _CLIP,
        (
            "a parameter without per-example gradients is skipped",
            SENSITIVITY,
            "if complete and totals.keys() < trainable.keys():",
            "if False:",
            f"{_CLIP}::test_an_unused_parameter_is_an_error",
        ),
        (
            "the views of an example are normed one by one",
            SENSITIVITY,
            "return Materialised(torch.stack([one.per_example() for one in found]).sum(0))",
            (
                "return Materialised(torch.stack([one.per_example() for one in found]).sum(0), "
                "torch.stack([one.squared_norms() for one in found]).sum(0))"
            ),
            "tests/runs/test_augmentation.py::test_an_example_of_several_views_is_clipped_once",
        ),
        (
            "rows that are no examples are clipped",
            COUPLING,
            "        check_examples_first(squared_norms, size)\n        return torch.stack",
            "        return torch.stack",
            f"{_CLIP}::test_a_first_axis_that_is_not_the_example_is_an_error",
        ),
        (
            "a module that gives something else alone is believed",
            COUPLING,
            "        self.settle()\n        totals = self",
            "        totals = self",
            f"{_CLIP}::test_a_layer_that_gives_something_else_when_evaluated_alone_is_refused",
        ),
        (
            "of a parameter that is used twice one use is clipped",
            SENSITIVITY,
            "Materialised(torch.stack([one.per_example() for one in found]).sum(0))",
            "Materialised(found[0].per_example())",
            _LOOP,
        ),
        (
            "of a table that is used twice one use is clipped",
            SENSITIVITY,
            "found = [Lookup.merged(lookups), ",
            "found = [lookups[0], ",
            f"{_CLIP}::test_a_table_that_is_looked_up_twice_is_clipped_by_both_together",
        ),
        (
            "norms of several parameters are not added",
            SENSITIVITY,
            "torch.stack(list(squared_norms.values())).sum(0)",
            "torch.stack(list(squared_norms.values())).amax(0)",
            _LOOP,
        ),
        (
            "the bias of a layer is its gradient over the batch",
            COUPLING,
            "rows = grad.flatten(1) if one_position else grad.flatten(2).sum(2)",
            (
                "rows = grad.flatten(1) if one_position else grad.flatten(2).sum(2).mean(0, "
                "keepdim=True).expand(len(grad), -1)"
            ),
            _LOOP,
        ),
        (
            "contributions of the last microbatch stay",
            SENSITIVITY,
            "self._contributions = {name: [] for name in self._names.values()}",
            "self._contributions = {name: self._contributions.get(name, []) for name in self._names.values()}",
            _BOUNDED,
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/listening.py",
        _ARRANGED,
        (
            "ids of one axis are told by their number",
            COUPLING,
            "if once and tape.listening and all(one.ndim == 1 for one in tensors):",
            "if once and tape.listening and all(one.ndim == 1 and len(one) != tape.size for one in tensors):",
            f"{_POSITIONS}::test_the_sum_is_that_of_a_loop_also_for_as_many_examples_as_positions",
        ),
        (
            "activations of all examples are repeated for each",
            COUPLING,
            "if not tape.listening or not tensors or any(one.requires_grad for one in tensors):",
            "if not tape.listening or not tensors:",
            f"{_LEAVES}::test_activations_are_not_repeated",
        ),
        (
            "of several tensors that a module returns one has a gradient",
            SENSITIVITY,
            "        ctx.record(grads)\n",
            "        ctx.record((grads[0], *(None for _ in grads[1:])))\n",
        ),
        (
            "an output of all examples is one of the first",
            COUPLING,
            "    return row.expand(size, *row.shape[1:])\n",
            "    return torch.cat([row, row.detach().expand(size - 1, *row.shape[1:]) * 0])\n",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/arrangement.py",
        _ARRANGED,
        (
            "a trace of another row is overlooked",
            COUPLING,
            "    return not bool(rows.any())\n",
            "    return bool((rows.abs() < 1e-6).all())\n",
        ),
        (
            "positions of other examples are taken for an example's own",
            COUPLING,
            "return x.unflatten(0, (size, -1))\n",
            "return x.unflatten(0, (-1, size)).transpose(0, 1)\n",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/observed.py",
        _ARRANGED,
        (
            "an output that another is computed from counts twice",
            SENSITIVITY,
            "for k, one in enumerate(leaves) if isinstance",
            "for k, one in enumerate(pytree.tree_leaves(output)) if isinstance",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/quantizable.py",
        _ARRANGED,
        (
            "a frozen layer's rows are not looked at",
            COUPLING,
            '        run.elsewhere.add(f"{self.name}.weight")\n',
            "",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/passes.py",
        _CLIP,
        (
            "a backward pass may draw random numbers",
            COUPLING,
            "        if position.torch_moved():\n",
            "        if False:\n",
            f"{_CLIP}::test_draws_of_a_backward_pass_are_refused",
        ),
        (
            "a step leaves the global random stream moved",
            SECRET,
            "with seeded(self._key), Leaves.placed",
            "with Leaves.placed",
            f"{_CLIP}::test_a_model_that_draws_leaves_the_global_streams_as_they_were",
        ),
        (
            "model and loss draw by place",
            COUPLING,
            "losses = self._objective.drawing.by_record(lambda: self._forward(piece), self._key, piece.record_ids)",
            "losses = self._forward(piece)",
            _DRAWS,
        ),
        (
            "an error of the model about a record is shown",
            LEAK,
            "return not isinstance(error, DPQuantError) and not out_of_memory(error)",
            "return False",
            "tests/test_attacks.py::test_a_broken_record_contributes_nothing_and_nothing_is_said",
        ),
        (
            "one loss for the whole batch is taken",
            COUPLING,
            "if not isinstance(losses, Tensor) or losses.shape != (len(piece.record_ids),):",
            "if not isinstance(losses, Tensor):",
            "tests/training/test_private.py::test_bad_input_is_refused_before_any_work",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/contributions.py",
        _CONTRIBUTIONS,
        (
            "norms of embeddings have no margin",
            SENSITIVITY,
            "return self._by_example(keys_S, squares_S) * (1 + ROUND_OFF)",
            "return self._by_example(keys_S, squares_S)",
        ),
        (
            "rows of an embedding are summed in float32",
            SENSITIVITY,
            (
                "dtype=torch.float64, device=g_BTD.device)\n"
                "            total_SD.index_add_(0, places_BT.flatten(), g_BTD.flatten(0, "
                "1).double())"
            ),
            (
                "dtype=torch.float32, device=g_BTD.device)\n"
                "            total_SD.index_add_(0, places_BT.flatten(), g_BTD.flatten(0, 1))"
            ),
        ),
        (
            "an example that is left out is multiplied by zero",
            SENSITIVITY,
            "return torch.where(keep_B.view(-1, *[1] * (rows.ndim - 1)), rows, 0.0)",
            "return rows * keep_B.view(-1, *[1] * (rows.ndim - 1))",
            (_CONTRIBUTIONS, "tests/training/test_impact.py"),
        ),
        (
            "a table's rows of all examples are one",
            COUPLING,
            "firsts = torch.arange(len(self._ids), device=self._ids.device)[:, None] * self._num_rows",
            (
                "firsts = torch.zeros(len(self._ids), device=self._ids.device, "
                "dtype=torch.int64)[:, None] * self._num_rows"
            ),
        ),
        (
            "examples are given each other's weights",
            SENSITIVITY,
            "weights_B.to(sums_SD.dtype)[keys_S // self._num_rows]",
            "weights_B.to(sums_SD.dtype).flip(0)[keys_S // self._num_rows]",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/clip.py",
        "tests/engine/test_positions.py::test_the_sum_is_that_of_a_loop_also_for_as_many_examples_as_positions",
        (
            "as many positions as examples pass for these",
            SENSITIVITY,
            "        objective.try_routes(first, key)\n",
            "",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/disguise.py",
        "tests/engine/test_disguise.py",
        (
            "all examples get the first one's table",
            COUPLING,
            "return self._each[:, 0]",
            "return self._each[:1, 0].expand(len(self._each), *self._each.shape[2:])",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/routing.py",
        "tests/engine/test_transformers.py::test_a_table_of_relative_positions_leaves_the_layers_quantizable",
        (
            "no table is tried in disguise",
            WIRING,
            "for disguised in (False, True):",
            "for disguised in (False,):",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/weight_gradients.py",
        _CLIP,
        (
            "the first examples' gradients stand for all",
            WIRING,
            "gradients_of(one.take(rows))",
            "gradients_of(one.take(rows - rows[0]))",
            "tests/engine/test_clip.py::test_gradients_of_many_examples_are_formed_a_few_at_a_time",
        ),
        (
            "scales times factors are rounded to the nearest",
            SENSITIVITY,
            "return ((weights_B * scale_B).view(torch.int32) & -(2**16)).view(torch.float32)",
            "return (((weights_B * scale_B).view(torch.int32) + 2**15) & -(2**16)).view(torch.float32)",
            _BOUNDED,
        ),
        (
            "norms of codes are scaled twice",
            SENSITIVITY,
            "norms_B * scale_B.double().square()",
            "norms_B * scale_B.double().square().square()",
            _BOUNDED,
        ),
        (
            "sums of codes forget the scales",
            SENSITIVITY,
            "    if scale_B is None:\n        return weights_B\n",
            "    if scale_B is None or True:\n        return weights_B\n",
            _BOUNDED,
        ),
        (
            "some examples keep the scales of others",
            COUPLING,
            "scale_B = None if self.scale_B is None else self.scale_B[rows]",
            "scale_B = None if self.scale_B is None else self.scale_B[: len(rows)]",
            f"{_CLIP}::test_a_record_that_is_not_finite_contributes_nothing_and_a_huge_one_at_most_c",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/leaves.py",
        _LEAVES,
        (
            "a leaf's gradients are their mean over the batch",
            COUPLING,
            "leaf.grad.reshape(len(leaf), *parameter.shape)",
            "leaf.grad.mean(0, keepdim=True).expand_as(leaf.grad).reshape(len(leaf), *parameter.shape)",
            f"{_LEAVES}::test_the_sum_is_that_of_a_loop_over_single_examples",
        ),
        (
            "layers in a module that is evaluated alone record a second time",
            SENSITIVITY,
            "        if self.within(path):\n            return {}\n",
            "",
            f"{_LEAVES}::test_the_sum_is_that_of_a_loop_over_single_examples",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/routing.py",
        _LEAVES,
        (
            "a leaf is believed by the outputs alone",
            COUPLING,
            "        return _equal(found, wanted)\n",
            "        return True\n",
            f"{_LEAVES}::test_what_has_no_copy_for_each_example_is_refused",
        ),
        (
            "layers in a module that is evaluated alone stay quantized",
            SENSITIVITY,
            "        restore(model.get_submodule(path))\n",
            "        pass\n",
            f"{_LEAVES}::test_layers_that_are_not_called_are_not_quantized_and_this_is_said",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/per_example.py",
        "tests/engine/test_per_example.py",
        (
            "the formula of a base class is used",
            SENSITIVITY,
            'return type(module) in rules and "forward" not in module.__dict__',
            "return isinstance(module, tuple(rules))",
        ),
        (
            "a forward method of the user's own gets the formula",
            SENSITIVITY,
            'return type(module) in rules and "forward" not in module.__dict__',
            "return type(module) in rules",
        ),
        (
            "nobody compares what a module gives alone",
            COUPLING,
            "        compare(module, mine.detach(), theirs.detach())\n",
            "        pass\n",
            f"{_CLIP}::test_a_layer_that_gives_something_else_when_evaluated_alone_is_refused",
        ),
        (
            "a padding row of an embedding is trained",
            SENSITIVITY,
            "    if module.padding_idx is not None:\n",
            "    if False:\n",
            _LOOP,
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/summed.py",
        "tests/engine/test_twins.py",
        (
            "a tied table's norm forgets the cross term",
            SENSITIVITY,
            "return (total_B + crossed_B).clamp(min=0) + margin_B",
            "return total_B",
            "tests/engine/test_twins.py::test_a_tied_table_is_normed_as_its_materialised_gradients",
        ),
        (
            "a tied table's distance forgets the cross term",
            COUPLING,
            "total_B = total_B + 2 * (cross",
            "total_B = total_B + 0 * (cross",
            "tests/engine/test_twins.py::test_distances_of_a_tied_table_are_those_of_its_gradients",
        ),
        (
            "a tied table's lookups are added with another factor than its codes",
            SENSITIVITY,
            "scaled_weights(weights_B, scale_B) / scale_B, weights_B)",
            "weights_B, weights_B)",
            "tests/engine/test_twins.py::test_what_may_cancel_is_added_with_one_factor",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/recurrent.py",
        "tests/engine/test_twins.py",
        (
            "states are those after the step",
            SENSITIVITY,
            "torch.stack(ctx.states, 2)",
            "torch.stack(ctx.states[1:] + ctx.states[-1:], 2)",
            "tests/engine/test_twins.py::test_the_sum_is_that_of_a_loop_over_single_examples",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/weight_cache.py",
        _FROZEN,
        (
            "a frozen weight that was written to is used as it was",
            COUPLING,
            "if state != self._state:",
            "if self._state is None:",
            f"{_FROZEN}::test_a_frozen_weight_that_changes_is_packed_anew",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/context.py",
        _CLIP,
        (
            "trained weights are rounded as frozen ones",
            SECRET,
            "return self.key if self.trains(layer.weight) else _FROZEN_KEY",
            "return _FROZEN_KEY",
            f"{_FROZEN}::test_a_weight_that_is_frozen_later_or_trained_again_is_rounded_as_such",
        ),
        (
            "rounding draws follow the place in the batch",
            COUPLING,
            "row_keys(derive_key(self.key, layer.name, role, call), ids)",
            "row_keys(derive_key(self.key, layer.name, role, call), torch.arange(batch_size))",
            _BOUNDED,
        ),
        (
            "shared codes are those of another tensor",
            COUPLING,
            "if known() is source and its_key == key:",
            "if its_key == key:",
            f"{_FROZEN}::test_codes_are_shared_by_one_tensor_alone",
        ),
        (
            "shared codes outlive a write to the tensor",
            COUPLING,
            "key = (source._version, x.shape,",
            "key = (0, x.shape,",
            f"{_FROZEN}::test_codes_are_shared_by_one_tensor_alone",
        ),
        (
            "rounding draws do not follow the step",
            SECRET,
            "row_keys(derive_key(self.key, layer.name, role, call)",
            "row_keys(derive_key(0, layer.name, role, call)",
            "tests/engine/test_layers.py::test_draws_follow_key_layer_role_call_and_record_and_nothing_else",
        ),
        (
            "records of the last microbatch are kept",
            COUPLING,
            "        self.record_ids = record_ids\n",
            "        self.record_ids = record_ids if self.record_ids is None else self.record_ids\n",
            _BOUNDED,
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/randomness.py",
        "tests/engine/test_randomness.py",
        (
            "dropout follows the place in the batch",
            COUPLING,
            "enumerate(row_keys(key, self._ids).tolist())",
            "enumerate(row_keys(key, torch.arange(len(self._ids))).tolist())",
            ("tests/engine/test_randomness.py", _DRAWS),
        ),
        (
            "all records have the same dropout mask",
            COUPLING,
            "enumerate(row_keys(key, self._ids).tolist())",
            "enumerate(row_keys(key, 0 * self._ids).tolist())",
        ),
        (
            "the second draw of a pass repeats the first",
            COUPLING,
            'derive_key(self._key, "draw", self._calls)',
            'derive_key(self._key, "draw")',
        ),
        (
            "torch's global stream is not restored",
            SECRET,
            "        torch.random.set_rng_state(before[2])\n",
            "        pass\n",
        ),
        (
            "a generator of the user's own draws by itself",
            SECRET,
            "return None if isinstance(value, torch.Generator) else value",
            "return value",
        ),
        (
            "a fused kernel draws its own dropout",
            COUPLING,
            "    if any(argument.name in _DROPS for argument in func._schema.arguments):\n",
            "    if False:\n",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/batches.py",
        "tests/engine/test_batches.py",
        (
            "the last microbatch is shorter than the others",
            COUPLING,
            "yield torch.arange(start, start + size).clamp_(max=count - 1), min(size, count - start)",
            "yield torch.arange(start, min(start + size, count)), min(size, count - start)",
            f"{_CLIP}::test_every_pass_has_the_same_number_of_examples_however_many_there_are",
        ),
        (
            "a batch may have fewer rows than records",
            COUPLING,
            "if leaf.ndim == 0 or len(leaf) != count:",
            "if leaf.ndim == 0:",
        ),
        (
            "an error about rows tells how many were drawn",
            LEAK,
            '"Expected every tensor of a collated batch',
            'f"({count}) Expected every tensor of a collated batch',
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/fused_attention.py",
        "tests/engine/test_fused_attention.py",
        (
            "a thread's end takes the attention of another thread's step, and its last bits, away",
            COUPLING,
            "            if not _blocks:\n",
            "            if True:\n",
        ),
    ),
    *mutants_of(
        f"{_ENGINE}/group_norm.py",
        "tests/engine/test_group_norm.py",
        (
            "gradients of a normalisation are those of the batch",
            COUPLING,
            "ctx.tape.add(ctx.layer.weight, Materialised(grad_weight))",
            "ctx.tape.add(ctx.layer.weight, Materialised(grad_weight.mean(0, keepdim=True).expand_as(grad_weight)))",
        ),
        (
            "a normalisation's bias is not clipped",
            SENSITIVITY,
            "            ctx.tape.add(ctx.layer.bias, Materialised(grad_bias))\n",
            "",
        ),
    ),
    *mutants_of(
        f"{_CHECKS}/isolation.py",
        (_ISOLATION, _COUPLINGS),
        (
            "the other mode is not compared",
            COUPLING,
            "            probe.compare_in_the_other_mode()\n",
            "            pass\n",
            f"{_ISOLATION}::test_coupling_is_refused_in_either_mode_and_behind_dropout",
        ),
        (
            "a coupling at the run's own size is not said",
            COUPLING,
            "    if not equal:\n",
            "    if False:\n",
            f"{_ISOLATION}::test_a_coupling_at_one_size_is_refused_at_that_size",
        ),
        (
            "behind a factor of zero a coupling at the run's own size is not seen",
            COUPLING,
            "losses_of(found.compared, piece",
            "losses_of(found.objective, piece",
            f"{_ISOLATION}::test_a_coupling_at_one_size_is_seen_behind_a_factor_of_zero",
        ),
        (
            "records whose gradients differ pass the probe of an epoch",
            COUPLING,
            "if not (one.distance(other) <= TOLERANCE * norm or not norm < math.inf):",
            "if False:",
            f"{_ISOLATION}::test_the_probe_of_an_epoch_sees_a_coupling_of_gradients_alone",
        ),
    ),
    *mutants_of(
        f"{_CHECKS}/codes.py",
        (_ISOLATION, _COUPLINGS),
        (
            "codes are not compared among batchmates",
            COUPLING,
            "            _check_codes(objective, specimens, step)\n",
            "",
            f"{_COUPLINGS}::test_a_scale_over_the_batch_in_the_quantizer_is_refused",
        ),
    ),
    *mutants_of(
        f"{_CHECKS}/probe.py",
        (_ISOLATION, _COUPLINGS),
        (
            "gradients are not compared with autograd's",
            SENSITIVITY,
            "            self.compare_with_autograd()\n",
            "            pass\n",
            f"{_ISOLATION}::test_coupled_examples_and_hidden_uses_are_refused",
        ),
        (
            "layers stay as the analysis left them",
            ANALYSIS,
            "        set_precisions(model, precisions)\n        for module",
            "        for module",
            "tests/training/test_impact.py::test_everything_else_is_left_bitwise_as_it_was",
        ),
    ),
]
