# SPDX-License-Identifier: Apache-2.0
"""dpquant train with scales over the whole microbatch. NOT PRIVATE: it shows what per-example scales cost or gain.

    python -m experiments.per_tensor train OPTIONS

One example's largest value then decides every other example's rounding, so that no clipping bounds what it changes. The
checks that examples are kept apart would refuse it, so they are left out. The record of such a run has no epsilon.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dpquant.app import cli
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.checks import isolation
from dpquant.engine import layers
from dpquant.formats import NumberFormat, Rounding
from dpquant.training import private, start

NOT_PRIVATE = "NOT PRIVATE, whatever was printed before: scales were taken over the batch."


def with_one_scale(
    x: Tensor,
    format: NumberFormat,
    rounding: Rounding,
    row_keys: Tensor,
    *,
    clip: float | None = None,
    one_sided: bool = False,
    zero_point: int = 0,
) -> QTensor:
    """As `quantize_rows`, but all rows share a scale: the naive way, which is not private."""
    whole = quantize_rows(
        x.reshape(1, -1), format, rounding, row_keys[:1], clip=clip, one_sided=one_sided, zero_point=zero_point
    )
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    codes = whole.codes.reshape(x.shape).contiguous(memory_format=layout)
    return QTensor(codes=codes, scale=whole.scale.expand(len(x)).contiguous(), zero_point=zero_point)


def main(arguments: list[str]) -> int:
    """Run the command line of `dpquant` with shared scales, and take the promise out of its record."""
    with (
        mock.patch.object(layers, "quantize_rows", with_one_scale),
        mock.patch.object(isolation, "_check_codes"),
        mock.patch.object(isolation, "_check_quantized_losses"),
        mock.patch.object(start, "check_at_size"),
        mock.patch.object(private, "keeps_apart", return_value=True),
    ):
        code = cli.run(arguments)
    if code == 0:
        path = Path(arguments[arguments.index("--out") + 1]) / "record.json"
        record = json.loads(path.read_text())
        record |= {"epsilon": None, "epsilon_analysis_share": None, "statement": NOT_PRIVATE}
        record["per_epoch"] = [{**epoch, "epsilon": None} for epoch in record["per_epoch"]]
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(NOT_PRIVATE)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
