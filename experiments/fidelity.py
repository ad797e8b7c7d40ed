# SPDX-License-Identifier: Apache-2.0
"""E8 without a run per format: compares a trained network with all layers in a format to full precision.

The network is trained privately in full precision. For each format this measures the cosine between the sum of clipped
gradients of some training records in the format and in full precision, and the accuracy on a part of the test set. With
other records, cosines differ by up to a tenth. The measurement is not private.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dpquant.data.held import Held
from dpquant.engine.context import StepContext
from dpquant.engine.layers import quantizable_layers, running, set_policy
from experiments.drawing import draw_rows
from experiments.ranking import NETWORKS, clipped_gradient, network, settings_and_data, trained
from experiments.runner import RESULTS, Run, Site

NETWORK = "ResNet18, GTSRB"
RECORDS, EVERY, BATCH = 512, 4, 256  # training records; every 4th test record; examples per pass
A = "int4@2.5#"  # format of the weights where activations vary
FORMATS = {
    "int8": "int8",
    "luq-fp4": "luq-fp4",
    "luq-fp4, forward to nearest": "e3m0,e3m0,e3m0~",
    "luq": "luq",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "int4, activations signed @2.5": f"{A},int4@2.5,e3m0~",
    **{f"int4, activations of one sign @{c}": f"{A},int4@{c}+,e3m0~" for c in ("2.5", "3", "3.5")},
    "int4-clip (of one sign @4)": "int4-clip",
    "int4, activations of one sign @5": f"{A},int4@5+,e3m0~",
    **{f"weight alone int4@{c}#": f"int4@{c}#,int8,int8~" for c in ("2", "2.5", "3")},
    "activation alone int4@4+": "int8,int4@4+,int8~",
    "gradient alone e3m0~": "int8,int8,e3m0~",
    "gradient alone e3m0": "int8,int8,e3m0",
    "gradient alone int4": "int8,int8,int4",
    "gradient alone int4@4": "int8,int8,int4@4",
    **{f"gradient alone e3m0~@{c}": f"int8,int8,e3m0~@{c}" for c in ("5", "16")},
    "gradient int8 to nearest": "int8,int8,int8",
    "backward luq-fp4": "int8/luq-fp4/luq-fp4",
    "backward int4-clip": "int8/int4-clip/int4-clip",
}


def run(site: Site) -> None:
    """Measure every format; write results/fidelity.json and results/fidelity.png."""
    training = Run(NETWORK, 0, NETWORKS[NETWORK])
    folder = trained(training, site)
    if folder is None:
        return
    settings, dataset = settings_and_data(folder)

    def measured(format: str, *, quantized: bool) -> tuple[Tensor, float]:
        """Return the sum of clipped gradients and the accuracy, with all layers or no layer quantized to a format."""
        model = network(folder, settings, dataset, format)
        set_policy(model, quantizable_layers(model) if quantized else ())
        ids = torch.arange(0, len(dataset.train), len(dataset.train) // RECORDS)[:RECORDS]
        gradient = clipped_gradient(model, dataset.train, ids, settings.max_grad_norm)
        return gradient, _accuracy(model, dataset.test)

    full, accuracy = measured("luq-fp4", quantized=False)
    rows = {"full precision": {"format": "full", "cosine": 1.0, "accuracy": accuracy}}
    for name, format in FORMATS.items():
        found, accuracy = measured(format, quantized=True)
        cosine = float(found @ full / found.norm() / full.norm())
        rows[name] = {"format": format, "cosine": cosine, "accuracy": accuracy}
        print(f"{name:40s} cosine {cosine:.3f}  accuracy {accuracy:.3f}", flush=True)
    result = {"command": training.command, "num_records": RECORDS, "test_every": EVERY, "rows": rows}
    (RESULTS / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / "fidelity.png")


@torch.no_grad()
def _accuracy(model: nn.Module, split: Held) -> float:
    """Return the accuracy on every `EVERY`-th record, with the layers quantized as they are set."""
    right, all_ids = 0, torch.arange(0, len(split), EVERY)
    for ids in all_ids.split(BATCH):
        inputs, targets = split.batch(ids)
        with running(model, StepContext(key=0, record_ids=ids)):
            right += int((model(inputs).argmax(1) == targets).sum())
    return right / len(all_ids)


def draw(results: dict, path: Path) -> None:
    """Draw what `run` found: the cosine of each format, best first."""
    cosines = {name: [row["cosine"]] for name, row in results["rows"].items()}
    draw_rows(
        cosines, path, NETWORK, paper={}, measure="cosine of the clipped gradients' sum with full precision's",
        digits=2, note="one trained network",
    )  # fmt: skip
