# SPDX-License-Identifier: Apache-2.0
"""Loads the model of a run that has ended, as a plain torch module: `dpquant.load(RUN)`.

The model is built from model.json and filled from model.safetensors, whose hash has to be the record's. Neither data
nor the folder of a pretrained network is needed.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from dpquant.data import models
from dpquant.data.pretrained import rebuilt
from dpquant.engine.convert import fix
from dpquant.errors import DataError, SettingError, expect
from dpquant.runs.description import ModelDescription
from dpquant.runs.names import CONFIG, DESCRIPTION, DIVERGED, MODEL, RECORD
from dpquant.runs.record import RunRecord, sha256


def load(run: Path | str) -> nn.Module:
    """Return the model of a run that has ended.

    Args:
      run: directory of the run, or a folder that `dpquant export RUN DIR` has made.
    Returns: a module of torch's own layers (and of the user's, for `model=module:function`, which is imported as
      `dpquant train` does, from the working directory), on the CPU, in evaluation mode. It maps inputs as model.json
      describes them, float32 [B, *input_shape] or the int64 tensors of texts by name, to float32 [B, outputs].
    Raises:
      SettingError: there is no run, or it has not ended.
      DataError: model.safetensors is not the file that the record names, or a file cannot be read.
      ModelError: the model cannot be built.
    Privacy: post-processing of what the run has released.
    """
    expect("run", run, (Path, str), "the path of a run's directory", "Give 'runs/one'")
    run = Path(run)
    check_ended(run)
    description = described(run)
    check_model(run, RunRecord.read(run / RECORD))
    model = built(description)
    try:
        load_model(model, run / MODEL)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(
            f"Expected {run / MODEL} to hold the parameters of model={description.model}; got {type(error).__name__}: "
            f"{error}. The function that builds it, or a package, may have changed since. Restore them."
        ) from error
    return model.requires_grad_(False).eval()


def check_ended(run: Path) -> None:
    """Check that a directory holds a run that has ended.

    Raises:
      SettingError: it does not; the message says what there is.
    """
    if (run / RECORD).is_file():
        return
    if not run.is_dir() or not (run / CONFIG).is_file():
        found = "" if run.is_dir() else ", which is none"
        raise SettingError(
            f"Expected the directory of a run; got {run}{found or f', which holds no {RECORD}'}. Name the directory "
            "that dpquant train has made."
        )
    if (run / DIVERGED).is_file():
        there = f"It diverged; {MODEL} is of its last finite epoch. Begin a new run."
    elif (run / MODEL).is_file():
        there = f"{MODEL} is of its last whole epoch, and its epsilon is not final. Finish it: dpquant resume {run}"
    else:
        there = f"There is no model yet. Finish it: dpquant resume {run}"
    raise SettingError(f"Expected a run that has ended; got {run}, which holds no {RECORD}. {there}")


def described(run: Path) -> ModelDescription:
    """Return what a run says of its model.

    Raises:
      DataError: it says nothing that can be read.
    """
    if not (run / DESCRIPTION).is_file():
        raise DataError(
            f"Expected {run} to hold {DESCRIPTION}; it holds none. The runs of early versions do not say how their "
            f"model is built. Build it yourself, and fill it by safetensors.torch.load_model(model, '{run / MODEL}')."
        )
    return ModelDescription.read(run / DESCRIPTION)


def check_model(run: Path, record: RunRecord) -> None:
    """Check that the file of a run's model is the one that its record names.

    Raises:
      DataError: it is not there, or is another one.
    """
    path = run / MODEL
    if not path.is_file():
        raise DataError(f"Expected {path}, the model of the run; it is not there. Restore it from a copy.")
    if record.model_sha256 is not None and (found := sha256(path)) != record.model_sha256:
        raise DataError(
            f"Expected {path} to have the SHA-256 {record.model_sha256}, as {RECORD} says; got {found}. It is another "
            "model than the run released, of which nothing is known. Restore both from a copy."
        )


def built(description: ModelDescription) -> nn.Module:
    """Build the model that is described, with parameters that mean nothing yet.

    Raises:
      ModelError: it cannot be built.
    """
    if description.network is not None:
        model = rebuilt(description.network, lora=description.lora, name=description.model)
    else:
        model = models.build(
            description.model,
            num_classes=description.num_classes,
            input_shape=tuple(description.input_shape),
            width=description.width,
            categories=description.categories,
            vocabulary=None if description.texts is None else description.texts.vocabulary,
        )
    return fix(model) if description.fix else model
