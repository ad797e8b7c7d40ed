# SPDX-License-Identifier: Apache-2.0
"""The paper's figures, beside which ours stand."""

# Validation accuracy at epsilon = 8 (DPQuant, arXiv 2509.03472), by data set, network and row
PAPER = {
    "baselines-gtsrb": {
        "static 0.5": "69.06 ± 5.63",
        "dpquant 0.5": "76.75",
        "static 0.9": "57.49 ± 4.46",
        "dpquant 0.9": "67.67",
    },
    "networks": {
        "resnet50, static 0.75": "58.13 ± 8.50",
        "resnet50, dpquant 0.75": "69.03",
        "resnet50, static 0.9": "47.40 ± 7.23",
        "resnet50, dpquant 0.9": "59.87",
        "densenet121, static 0.5": "65.47 ± 5.42",
        "densenet121, dpquant 0.5": "71.05",
    },
}


def published(table: str) -> dict[str, float]:
    """Return {row: the paper's mean} of a table; {} if the paper has none."""
    return {row: float(text.split()[0]) for row, text in PAPER.get(table, {}).items()}
