# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant check-model`. Loads no torch before it runs."""

from typing import Annotated

import typer
from rich.console import Console

from dpquant.app.console import print_model_check
from dpquant.app.options import WRONG_RESULT, Json


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
