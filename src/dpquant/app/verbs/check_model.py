# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant check-model`. Loads no torch before it runs."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import WRONG_RESULT, Json

if TYPE_CHECKING:
    from dpquant.app.check_model import ModelCheck


def check_model(
    model: Annotated[str, typer.Argument(help="your own module:function, or a name as for train")],
    data: Annotated[
        str | None, typer.Option(help="data set, of which the input shape and number of classes are used")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="side in pixels that its images are resized to")] = None,
    input_shape: Annotated[str | None, typer.Option(help="of one input, as 3x32x32, or 30 for a table")] = None,
    tokens: Annotated[int | None, typer.Option(help="length of a text, instead of an input shape")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="number of different tokens")] = None,
    classes: Annotated[int | None, typer.Option(help="number of classes; with data its own")] = None,
    width: Annotated[float, typer.Option(help="factor on the channels of a named model")] = 1.0,
    format: Annotated[str, typer.Option(help="of quantized layers, as for train")] = "luq-fp4",
    fix: Annotated[bool, typer.Option("--fix", help="Replace BatchNorm, show the fixed model and check that.")] = False,
    as_json: Json = False,
) -> int:
    """List everything for which a run would refuse a model, with what to do, and its layers.

    Modules that mix examples, outputs that do not fit the classes, a model that cannot be saved, and a live check on
    synthetic records, in full precision and quantized, that no example influences another's gradient. Reads no record:
    with --data the shape and the classes are those that the data set is known for, or the names of its folders. Writes
    nothing; --fix changes nothing but what is checked, and `dpquant train --fix` trains that.

    Exit code 1: something has to change. 2: the model cannot be built, or an option is wrong.

    With --json: passed (true: nothing has to change); model, input_shape, num_classes, vocabulary (null without texts)
    and format; findings, a list of stage (type, outputs, saving, full precision, quantized, preparing or fix), module,
    problem and fix (text; null where the problem says it); probe, for full precision and quantized passed, failed or
    not run; probed, in words on what; layers, a list of name, kind, parameters, macs (null: not counted), format (null:
    never quantized), reason and notes; and fixed_model (text; null without --fix).

    Example: dpquant check-model my_models:build --input-shape 3x32x32 --classes 10 --fix
    """
    from dpquant.app.check_model import built
    from dpquant.app.check_model import check_model as checked
    from dpquant.app.form import Form

    form = Form.chosen(data, image_size, input_shape, classes, tokens, vocabulary)
    found = checked(built(model, form, width), form, name=model, format=format, fixed=fix)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_model_check(Console(), found)
    return 0 if found.passed else WRONG_RESULT


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
