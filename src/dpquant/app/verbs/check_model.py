# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant check-model`. Loads no torch before it runs."""

import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import OF_SOURCES, WRONG_RESULT, Json, with_settings
from dpquant.app.output import results
from dpquant.runs.named import check_named
from dpquant.runs.settings import TrainSettings

if TYPE_CHECKING:
    from dpquant.app.check_model import ModelCheck


@functools.partial(with_settings, names=(*OF_SOURCES, "data", "width", "lora", "train_only"))
def check_model(
    given: dict[str, Any],
    model: Annotated[str, typer.Argument(help="your own module:function, hf:PATH, or a name as for train")],
    input_shape: Annotated[str | None, typer.Option(help="of one input, as 3x32x32, or 30 for a table")] = None,
    tokens: Annotated[int | None, typer.Option(help="length of a text, instead of an input shape")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="number of different tokens")] = None,
    classes: Annotated[
        str | None, typer.Option(help="their number; with data of texts their names, and of others its own")
    ] = None,
    format: Annotated[str, typer.Option(help="of quantized layers, as for train")] = "luq-fp4",
    fix: Annotated[bool, typer.Option("--fix", help="Replace BatchNorm, show the fixed model and check that.")] = False,
    as_json: Json = False,
) -> int:
    """List everything for which a run would refuse a model, with what to do, and its layers.

    Modules that mix examples, outputs that do not fit the classes, a model that cannot be saved, and a live check on
    synthetic records, in full precision and quantized, that no example influences another's gradient. Reads no record:
    with --data the shape and the classes are those that the data set is known for, the names of its folders, or those
    in the spec of a table, the tokenizer of texts and the manifest of packed records. A pretrained network, hf:PATH,
    is given made-up tokens where there is no --data. Writes nothing; --fix changes nothing but what is checked, and
    `dpquant train --fix` trains that.

    Exit code 1: something has to change. 2: the model cannot be built, or an option is wrong.

    With --json: passed (true: nothing has to change); model, input_shape, num_classes, vocabulary (null without texts)
    and format; findings, a list of stage (type, outputs, saving, full precision, quantized, preparing or fix), module,
    kind, modules (of how many the same is said), problem and fix (text; null where the problem says it); probe, for
    full precision and quantized passed, failed or not run; probed, in words on what; layers, a list of name, kind,
    parameters, macs (null: not counted), format (null: never quantized), reason and notes; and fixed_model (text; null
    without --fix).

    Example: dpquant check-model my_models:build --input-shape 3x32x32 --classes 10 --fix

    Example: dpquant check-model hf:my-bert --lora 16
    """
    given = given if classes is None else {**given, "classes": classes}
    if "data" in given:
        check_named(TrainSettings.chosen({**given, "model": model}), records=False)
    from dpquant.app.check_model import check_model as checked
    from dpquant.app.form import Shape, chosen
    from dpquant.runs.objects import built_model

    shape = Shape(input_shape=input_shape, tokens=tokens, vocabulary=vocabulary)
    settings, form = chosen(model, given, shape)
    found = checked(built_model(settings, form), form, name=model, format=format, fixed=fix)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_model_check(results(), found)
    return 0 if found.passed else WRONG_RESULT


def print_model_check(console: Console, found: "ModelCheck") -> None:
    """Print a model's layers, how the live check went, and everything that has to change."""
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("layer", "kind", "parameters", "million MACs", "quantized in", "notes")):
        whole = "ellipsis" if number else "fold"  # --train-only takes whole names
        table.add_column(title, justify="right" if number in (2, 3) else "left", overflow=whole)
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
        others = "" if one.modules == 1 else f" and {one.modules - 1} more"
        where = f"{one.module or 'the model'}{others} ({one.kind}): " if one.kind else ""
        lines.append(f"\n{number}. {where}{one.problem}" + (f".\n   {one.fix}." if one.fix else ""))
    count = len(found.findings)
    lines.append(f"\n{count} to change: a run would refuse this model." if count else "\nNothing has to change.")
    console.print("\n".join(lines), markup=False, highlight=False)
