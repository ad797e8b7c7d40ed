# SPDX-License-Identifier: Apache-2.0
"""`dpquant export --to`: writes a run's model as one file for other programs, with the privacy statement in it.

Each file is loaded again by the program that it is for, and run on random inputs beside the model: one that computes
something else is not written. Batches of any size are accepted. Texts have the largest length.

An exported graph would name the folders of this machine, in the traces of calls that torch adds to its nodes, so these
are taken out.

Privacy: post-processing of what the run has released; the inputs are random numbers.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dpquant.app.export import spent_of, unplaced_model
from dpquant.errors import ModelError, SettingError, did_you_mean, quoted
from dpquant.privacy.plan import rounded_up
from dpquant.runs.description import ModelDescription
from dpquant.runs.loading import built, described, load
from dpquant.runs.names import RECORD
from dpquant.runs.record import RunRecord, sha256, write_whole

STATEMENT_END = ".privacy.txt"
_TOLERANCE = 1e-4  # of the largest output, or of 1: what float32 in another order of sums may differ by
_BATCHES = (1, 3, 8)  # sizes on which a file is tried
_TRACED = 2  # inputs with which a graph is recorded
_GRAPH_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack")

Metadata = Mapping[str, str]


class DiffersError(ModelError):
    """A written model computes something else than the run's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file.

    Attributes:
      write: (model, inputs, metadata, path): writes the file.
      outputs: (path, description, inputs): what the file computes.
      needs: packages that are not installed with dpquant.
      extra: of dpquant, with which they are installed.
    """

    write: Callable[[nn.Module, Any, Metadata, Path], None]
    outputs: Callable[[Path, ModelDescription, Any], Tensor]
    needs: Sequence[str] = ()
    extra: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model that was written.

    Attributes:
      path: of the file; its statement lies beside it.
      bytes, sha256: of the file.
      difference: largest difference to an output of the run's model, on random inputs.
      inputs: {name: shape of one input}.
    """

    path: str
    bytes: int
    sha256: str
    difference: float
    inputs: Mapping[str, Sequence[int]]

    @property
    def told(self) -> str:
        """What was done, in one line."""
        named = ", ".join(f"{name} [batch, {', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
        return (
            f"{self.path}: {self.bytes:,} bytes, takes {named}. Its outputs differ from the model's by at most "
            f"{self.difference:.2g} on {sum(_BATCHES)} random inputs. The privacy statement is in it, and in "
            f"{self.path}{STATEMENT_END}."
        )

    def to_json(self) -> str:
        """Return the result as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def write_model(run: Path, to: str, out: Path, *, formats: Mapping[str, Format] | None = None) -> ModelFile:
    """Write a run's model as one file, and its privacy statement beside it.

    Args:
      run: directory of a run that has ended.
      to: name of the format.
      out: the file, which must not be there yet.
      formats: that are known; None: `FORMATS`.
    Raises:
      SettingError: the format is unknown, a package is missing, or the file cannot be written.
      LedgerError: the ledger is not as it was written, or has charged more than the record says.
      DataError, ModelError: the model cannot be loaded or written.
      DiffersError: the file computes something else.
    Privacy: post-processing.
    """
    formats = FORMATS if formats is None else formats
    if to not in formats:
        raise SettingError(
            f"Expected to to be one of {', '.join(formats)}; got to={to}. {did_you_mean(to, formats)}See dpquant "
            "export --help."
        )
    format = formats[to]
    if missing := [name for name in format.needs if importlib.util.find_spec(name) is None]:
        raise SettingError(
            f"Expected the packages {', '.join(format.needs)} for to={to}; {missing[0]} is not installed. Install "
            f"them by pip install 'dpquant[{format.extra}]'."
        )
    if out.exists() or not out.absolute().parent.is_dir():
        found = "which is there" if out.exists() else "in a folder that is not there"
        raise SettingError(
            f"Expected out to be a new file in a folder that exists; got out={out}, {found}. Nothing is overwritten. "
            "Name another one."
        )
    model, description, record = load(run), described(run), RunRecord.read(run / RECORD)
    (contents,) = spent_of(run, record).ledgers.values()
    metadata = _metadata(record, description, contents.head)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
            draft = Path(folder) / out.name
            difference = _written(model, description, format, metadata, draft)
            digest, size = sha256(draft), draft.stat().st_size
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            write_whole(out.with_name(out.name + STATEMENT_END), _statement(record, metadata, out.name, digest))
            draft.replace(out)
    except OSError as error:
        raise SettingError(
            f"Expected a place where a file can be written; got {out}: {error.strerror or error}. Make room, or name "
            "another one."
        ) from error
    shapes = {name: list(one.shape[1:]) for name, one in _named(random_inputs(description, 1, seed=0)).items()}
    return ModelFile(path=str(out), bytes=size, sha256=digest, difference=difference, inputs=shapes)


def _written(model: nn.Module, description: ModelDescription, format: Format, metadata: Metadata, draft: Path) -> float:
    """Write the file, run it beside the model, and return the largest difference."""
    try:
        with _quiet():
            format.write(model, random_inputs(description, _TRACED, seed=0), metadata, draft)
            tried = [random_inputs(description, size, seed=size) for size in _BATCHES]
            found = [format.outputs(draft, description, inputs) for inputs in tried]
    except OSError:
        raise
    except Exception as error:  # exporters raise many types
        raise ModelError(
            f"Expected a model that can be written as {draft.suffix or draft.name}; got {quoted(error)}. Nothing was "
            "written. Choose another format, or load the model by dpquant.load."
        ) from error
    with torch.no_grad():
        expected = [model(inputs) for inputs in tried]
    differences = [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]
    largest = max(float(one.abs().max()) for one in expected)
    if not all(one <= _TOLERANCE * max(1.0, largest) for one in differences):
        raise DiffersError(
            f"Expected a file that computes what the model does, within {_TOLERANCE * max(1.0, largest):.2g}; got a "
            f"difference of {max(differences):.2g} on random inputs. Nothing was written. Choose another format."
        )
    return max(differences)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context: exporters do not speak of themselves."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def random_inputs(description: ModelDescription, count: int, *, seed: int) -> Any:
    """Return random inputs in a model's domain, float32 or int64 [count, ...]; of texts {name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    form = description.texts
    if form is None:
        inputs = torch.rand(count, *description.input_shape, generator=generator) * 2 - 1
        for place, size in enumerate(description.categories, description.input_shape[-1] - len(description.categories)):
            inputs[:, place] = torch.randint(size, (count,), generator=generator).float()
        return inputs
    lengths = torch.randint(1, form.max_length + 1, (count, 1), generator=generator)
    mask = (torch.arange(form.max_length) < lengths).long()
    ids = torch.randint(form.vocabulary, mask.shape, generator=generator)
    found = {"input_ids": torch.where(mask == 1, ids, form.padding), "attention_mask": mask}
    return found | ({"token_type_ids": torch.zeros_like(mask)} if form.pairs else {})


def _named(inputs: Any) -> dict[str, Tensor]:
    return inputs if isinstance(inputs, dict) else {"inputs": inputs}


def _metadata(record: RunRecord, description: ModelDescription, head: str) -> dict[str, str]:
    """Return what travels in the file: statement, numbers, and how inputs are made. No folder of this machine."""
    public = dataclasses.replace(description, model=unplaced_model(description.model))
    return {
        "privacy_statement": record.statement.strip(),
        "epsilon": rounded_up(record.epsilon),
        "delta": f"{record.delta:g}",
        "ledger_head": head,
        "run": "" if record.provenance is None else record.provenance.run_id,
        "dpquant": record.dpquant,
        "model_json": json.dumps(dataclasses.asdict(public)),
    }


def _statement(record: RunRecord, metadata: Metadata, name: str, digest: str) -> str:
    return (
        f"{record.statement.strip()}\n\nFile {name}, SHA-256 {digest}, of run {metadata['run'] or 'without a name'}, "
        f"dpquant {record.dpquant}.\nModel {record.model_sha256 or 'without a hash'}, head of the ledger "
        f"{metadata['ledger_head']}.\n"
    )


# The formats


def _write_safetensors(model: nn.Module, inputs: Any, metadata: Metadata, path: Path) -> None:
    save_model(model, str(path), metadata=dict(metadata))


def _outputs_of_safetensors(path: Path, description: ModelDescription, inputs: Any) -> Tensor:
    model = built(description)
    load_model(model, path)
    with torch.no_grad():
        return model.eval()(inputs)


def _program(model: nn.Module, inputs: Any) -> torch.export.ExportedProgram:
    """Return the model as a graph for batches of any size, without traces of where it was made."""
    batch = {0: torch.export.Dim.DYNAMIC}
    dynamic = {name: batch for name in inputs} if isinstance(inputs, dict) else batch
    with torch.no_grad():
        program = torch.export.export(model, (inputs,), dynamic_shapes=(dynamic,), strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for name in _GRAPH_TRACES:
                node.meta.pop(name, None)
    return program


def _write_pt2(model: nn.Module, inputs: Any, metadata: Metadata, path: Path) -> None:
    files = {STATEMENT_END.lstrip("."): metadata["privacy_statement"], "metadata.json": json.dumps(metadata)}
    torch.export.save(_program(model, inputs), path, extra_files=files)


def _outputs_of_pt2(path: Path, description: ModelDescription, inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(inputs)


def _write_onnx(model: nn.Module, inputs: Any, metadata: Metadata, path: Path) -> None:
    names = list(_named(inputs))
    written = torch.onnx.export(
        _program(model, inputs), dynamo=True, input_names=names, output_names=["outputs"], verbose=False
    )
    assert written is not None
    written.model.metadata_props.update(metadata)
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
    written.save(str(path))


def _outputs_of_onnx(path: Path, description: ModelDescription, inputs: Any) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {name: values.numpy() for name, values in _named(inputs).items()}
    taken = {one.name: named[one.name] for one in session.get_inputs()}
    return torch.from_numpy(session.run(None, taken)[0])


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "safetensors": Format(write=_write_safetensors, outputs=_outputs_of_safetensors),
        "pt2": Format(write=_write_pt2, outputs=_outputs_of_pt2),
        "onnx": Format(
            write=_write_onnx, outputs=_outputs_of_onnx, needs=("onnx", "onnxscript", "onnxruntime"), extra="onnx"
        ),
    }
)
