# SPDX-License-Identifier: Apache-2.0
"""Finds out, on a few rows, how gradients of parameters are got that are used outside of a module of their own.

The model runs once as it is, perturbed a little, in full precision and in evaluation mode; autograd gives each row's
gradient of its own loss. A module whose output has the rows elsewhere than on its first axis, as these gradients show,
is called so from then on (`arrangement.py`). Each other parameter in question gets a leaf (`leaves.py`), form after
form, and only the module around it runs again. A form is taken if outputs are equal and each row's gradient is
autograd's. If none is, the modules around the parameter are evaluated one example at a time, the smallest first, and
compared in the same manner.
An embedding that is called with ids of one axis is called with ids for each example, and the whole model is compared.
What fits none is refused.

A run does this on synthetic records, and its isolation check then compares everything again among other batchmates.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpquant.engine.convert import restore
from dpquant.engine.disguise import Disguised
from dpquant.engine.layers import current_precisions, set_precisions
from dpquant.engine.leaves import Leaves, Routes, beside_layers, forms_of, place_of
from dpquant.engine.listening import repeated_ids, repeated_output
from dpquant.engine.observed import Observed, arrangements_in
from dpquant.engine.per_example import TOLERANCE, differs, has_formula, of_shared_output, one_at_a_time, unlike
from dpquant.engine.perturbation import shaken
from dpquant.engine.quantizable import QuantizableLayer
from dpquant.engine.randomness import seeded
from dpquant.engine.unrouted import ElsewhereFirst
from dpquant.errors import ModelError

_SHARE, _MOST_SHAKES = 0.1, 3  # as the isolation check perturbs
_SMALLEST = 1e-6  # of the largest row's gradient: what a row differs by that has none


def learn(
    model: nn.Module, trainable: dict[str, nn.Parameter], names: Iterable[str], losses: Callable[[], Tensor]
) -> bool:
    """Find routes for parameters, keep them on the model, and return whether there are new ones.

    The layers inside a module that is evaluated alone become plain torch layers; this is said by a warning.

    Args:
      model: a prepared model, whose parameters require gradients.
      trainable: {name: parameter} of its trainable parameters.
      names: of parameters that no hook reaches. Those whose module is not called are added.
      losses: runs model and loss on a few rows, at least two; returns `(rows,)`.
    Raises:
      ModelError: a parameter takes part in the losses in a way that gives no gradient per example.
    Privacy: looks at the rows that it is given. A run gives synthetic ones.
    """
    names, routes = _alike(model, trainable, names), Routes.of(model)
    search = _Search(model, trainable, routes, losses)
    with _plainly(model), torch.enable_grad():
        for shake in range(_MOST_SHAKES):
            with shaken(model, shake, _SHARE), seeded(0):
                open_ones = search.one_round(Observed.of(model, trainable, names, losses))
            if not open_ones:
                break
    for path in search.hosts:
        restore(model.get_submodule(path))
    if search.new or routes.unused:
        routes.keep(model)
    if search.hosts:
        _say(model, search.hosts)
    return search.new


def _alike(model: nn.Module, trainable: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return names and those of the same parameter in other modules of the same type, as that of other blocks.

    A layer or a module with a formula has no others: each is called in its own way.
    """
    places = (place_of(model, name) for name in names)
    kinds = {
        (type(owner), key)
        for owner, key in places
        if not isinstance(owner, QuantizableLayer) and not has_formula(owner)
    }
    same = (name for name in trainable if (type(place_of(model, name)[0]), place_of(model, name)[1]) in kinds)
    return {*names, *same}


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Run the model in full precision and in evaluation mode until the block ends."""
    modes = {module: module.training for module in model.modules()}
    precisions = current_precisions(model)
    try:
        set_precisions(model, {})
        model.eval()
        yield
    finally:
        set_precisions(model, precisions)
        for module, training in modes.items():
            module.training = training


def _say(model: nn.Module, hosts: Sequence[str]) -> None:
    kinds = sorted({type(model.get_submodule(path)).__name__ for path in hosts})
    warnings.warn(
        f"{len(hosts)} modules ({', '.join(kinds)}; the first is {hosts[0]}) use parameters of the layers in them "
        "without calling these. They are evaluated one example at a time, which is slower, and the layers in them are "
        "not quantized.",
        stacklevel=2,
    )


class _Search:
    """Looks for routes.

    Attributes:
      hosts: modules that are to be evaluated alone from now on.
      new: whether a route was found.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        routes: Routes,
        losses: Callable[[], Tensor],
    ):
        self._model, self._trainable, self._routes, self._losses = model, trainable, routes, losses
        self._paths = {module: path for path, module in model.named_modules()}
        self._alike: dict[Any, tuple[str, int]] = {}  # routes, by type of the owner, name in it and number of axes
        self.hosts: list[str] = []
        self.new = False

    def one_round(self, seen: "Observed") -> list[str]:
        """Find routes for the parameters that have a gradient; return the names of those that have none yet."""
        self._arrange(seen)
        self._routes.unused = {
            name for name, rows in seen.rows.items() if rows is None and beside_layers(place_of(self._model, name)[0])
        }
        left = []
        for name, rows in sorted(seen.rows.items(), key=lambda item: place_of(self._model, item[0])[0] in seen.calls):
            path = name.rpartition(".")[0]
            elsewhere = (self._routes.once, self._routes.shared, self._routes.arranged)
            known = name in self._routes.leaves or any(path in paths for paths in elsewhere)
            if rows is None or known or self._routes.within(name):
                continue
            if not bool(rows.isfinite().all()) or not bool(rows.any()):
                left.append(name)
            else:
                self._decide(seen, name)
                self.new = True
        return left

    def _arrange(self, seen: "Observed") -> None:
        """Note the modules all of whose calls have the rows on the same axis, which is not the first.

        One on which no loss depends, as a projection of the last block, is called like those of other blocks.
        """
        found = {self._paths[module]: arrangements_in(calls) for module, calls in seen.calls.items()}
        alike = {_without_numbers(path): kinds for path, kinds in found.items() if kinds}
        for path, kinds in found.items():
            kinds = kinds or alike.get(_without_numbers(path), set())
            if len(kinds) == 1 and "first" not in kinds:
                self.new |= path not in self._routes.arranged
                self._routes.arranged[path] = next(iter(kinds))

    def _decide(self, seen: "Observed", name: str) -> None:
        """Find the route of one parameter, or raise a ModelError."""
        parameter, (owner, key) = self._trainable[name], place_of(self._model, name)
        around = [module for module in self._around(name) if module in seen.calls]
        if type(owner) is nn.Embedding and owner in seen.calls:
            if self._fits_once(seen, owner, name):
                self._routes.once.add(self._paths[owner])
            elif not self._shares(seen, owner, name):
                raise ElsewhereFirst([name])
            return
        plain = not isinstance(owner, QuantizableLayer) and not beside_layers(owner)
        if plain and owner in seen.calls and self._shares(seen, owner, name):
            return
        kind = type(owner), key, parameter.ndim
        known = self._alike.get(kind)
        forms = [*forms_of(parameter.shape)]
        if known is not None:
            forms = [known[1]] if known[0] == "leaf" else []
        for form in forms:
            if around and self._fits(seen, around[0], name, form):
                self._routes.leaves[name] = form
                self._alike[kind] = "leaf", form
                return
        for place, host in enumerate(around):
            path = self._paths[host]
            if not path or known not in (None, ("alone", place)):  # the whole model would run without quantization
                continue
            separate: list[str] = []
            if self._fits_alone(seen, host, functools.partial(separate.append, path)):
                self._routes.alone.append(path)
                self._routes.separate += separate[:1]
                self._routes.leaves = {n: f for n, f in self._routes.leaves.items() if not self._routes.within(n)}
                self.hosts.append(path)
                self._alike[kind] = "alone", place
                return
        if known is not None:
            del self._alike[kind]
            return self._decide(seen, name)
        raise _unknown(name, owner)

    def _around(self, name: str) -> Iterator[nn.Module]:
        """Yield the module that owns a parameter, the module that holds it, and so on up to the model."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            yield self._model.get_submodule(path)

    def _fits(self, seen: "Observed", host: nn.Module, name: str, form: int) -> bool:
        """Whether a leaf of this form gives the host's outputs and each row's gradient."""
        wanted = seen.rows[name]
        assert wanted is not None
        found = torch.zeros_like(wanted)
        try:
            for call in seen.calls[host]:
                with seeded(0), Leaves.placed(self._model, {name: form}, len(wanted)) as leaves:
                    output = host.forward(*call.args, **call.kwargs)
                    outputs = [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
                    if len(outputs) != len(call.outputs):
                        return False
                    for mine, theirs in zip(outputs, call.outputs.values(), strict=True):
                        if mine.shape != theirs.shape or differs(mine.detach(), theirs):
                            return False
                    reaching = [(y, g) for y, g in zip(outputs, call.grads, strict=True) if g is not None]
                    if not reaching:
                        continue
                    ys, grads = zip(*reaching, strict=True)
                    leaf = leaves.leaf(self._trainable[name])
                    (gradient,) = torch.autograd.grad(ys, leaf, grads, allow_unused=True)
                    if gradient is not None:
                        found += gradient.reshape(found.shape)
        except Exception:  # the model's code may raise anything on a parameter of another shape
            return False
        return _equal(found, wanted)

    def _fits_once(self, seen: "Observed", table: nn.Embedding, name: str) -> bool:
        """Whether the model gives each row's gradient if the embedding's ids of one axis are repeated for each row."""
        wanted, found = seen.rows[name], []
        assert wanted is not None
        if any(ids.ndim != 1 for call in seen.calls[table] for ids in call.args if isinstance(ids, Tensor)):
            return False

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return repeated_ids(args, kwargs, len(wanted))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            found.append((args[0] if args else kwargs["input"], leaf := output.detach().requires_grad_()))
            return leaf

        with contextlib.ExitStack() as stack:
            stack.callback(table.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(table.register_forward_hook(after, with_kwargs=True).remove)
            try:
                grads = torch.autograd.grad(self._losses().sum(), [leaf for _, leaf in found], allow_unused=True)
            except Exception:  # the model's code may raise anything on positions for each example
                return False
        gradient = torch.zeros_like(wanted)
        for (ids, _), grad in zip(found, grads, strict=True):
            if grad is not None:
                for row in range(len(wanted)):
                    gradient[row].index_add_(0, ids[row], grad[row])
        return _equal(gradient, wanted)

    def _shares(self, seen: "Observed", owner: nn.Module, name: str) -> bool:
        """Note a module whose output is the same for all rows, and return whether it is one."""
        for disguised in (False, True):
            if self._fits_shared(seen, owner, name, disguised):
                self._routes.shared.add(self._paths[owner])
                if disguised:
                    self._routes.disguised.add(self._paths[owner])
                return True
        return False

    def _fits_shared(self, seen: "Observed", owner: nn.Module, name: str, disguised: bool) -> bool:
        """Whether the model gives each row's gradient if the module's output is repeated for each row."""
        wanted, found = seen.rows[name], []
        assert wanted is not None
        if any(not call.tensor or call.arrangement is not None for call in seen.calls[owner]):
            return False

        def after(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
            each = repeated_output(output.detach(), seen.size, disguised=disguised).clone().requires_grad_()
            found.append((args, kwargs, each))
            return Disguised(each) if disguised else each

        key = place_of(self._model, name)[1]
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(owner.register_forward_hook(after, with_kwargs=True).remove)
                losses = self._losses()
            grads = torch.autograd.grad(losses.sum(), [each for *_, each in found], allow_unused=True)
            gradient = torch.zeros_like(wanted)
            for (args, kwargs, _), grad in zip(found, grads, strict=True):
                if grad is not None:
                    gradient += of_shared_output(owner, args, kwargs, grad)[key].per_example()
        except Exception:  # the model's code may raise anything on an output for each example
            return False
        return _equal(gradient, wanted)

    def _fits_alone(self, seen: "Observed", host: nn.Module, not_vectorised: Callable[[], None]) -> bool:
        """Whether the host, evaluated one example at a time, gives its outputs and each row's gradient."""
        names = {p: name for name, p in self._trainable.items()}
        inner = {key: p for key, p in host.named_parameters() if p in names}
        wanted = {key: rows for key, p in inner.items() if (rows := seen.rows.get(names[p])) is not None}
        found = {key: torch.zeros_like(rows) for key, rows in wanted.items()}

        def compare(module: nn.Module, again: Tensor, output: Tensor) -> None:
            if differs(again, output):
                raise unlike(module)

        try:
            for call in seen.calls[host]:
                grads = {k: g for k, g in zip(call.outputs, call.grads, strict=True) if g is not None}
                outputs = {k: call.outputs[k] for k in grads}
                if any(y.ndim == 0 or len(y) != seen.size for y in outputs.values()):
                    return False
                if not outputs:
                    continue
                parts = one_at_a_time(
                    host, call.args, call.kwargs, outputs, grads, compare, inner, not_vectorised=not_vectorised
                )
                for key in found:
                    found[key] += parts[key].per_example()
        except ModelError:
            return False
        return all(_equal(found[key], wanted[key]) for key in found)


def _without_numbers(path: str) -> str:
    """Return a path without its numbers, which is that of the same module in every block."""
    return re.sub(r"\d+", "", path)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Whether each row's gradient is the wanted one, up to round-off; False if there is a NaN."""
    gaps, norms = (rows.reshape(len(rows), -1).norm(dim=1) for rows in (found - wanted, wanted))
    return bool((gaps <= TOLERANCE * norms + _SMALLEST * norms.max()).all())


def _unknown(name: str, owner: nn.Module) -> ModelError:
    return ModelError(
        f"Expected parameters whose gradients can be found for each example; got {name} of a {type(owner).__name__}, "
        "which is used beside other layers, or by another module than its own. A copy of it for each example does not "
        "fit the model's code, and no module around it gives the same for one example alone. Put it with what uses it "
        "into a small module, which is called with the batch, or freeze it: "
        f'model.get_parameter("{name}").requires_grad_(False)'
    )
