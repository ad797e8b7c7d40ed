# SPDX-License-Identifier: Apache-2.0
"""E6: compares the private ranking of layers with an exhaustive, non-private ranking.

A network is trained privately in full precision. Then the impact vectors of thousands of training records are computed
(not private), and the private analysis is simulated from these vectors many times: Poisson sample, clip, sum, noise.
The result is the rank correlation of a simulated analysis with the mean over all records and several roundings, against
the share of epsilon of one analysis per epoch; for the loss and for the gradient's direction.

Also measured is the quantity that both scores approximate: the loss of the sum of clipped gradients, along its own
direction, if one layer runs quantized in all three products (not private).
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from scipy import stats
from torch import Tensor, nn

from dpquant.data import dataset as data
from dpquant.data.held import Held
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import prepare, quantizable_layers, set_policy
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.runs.evaluation import per_example_loss
from dpquant.runs.objects import model_of
from dpquant.runs.settings import TrainSettings, from_toml, plan_of
from dpquant.training.impact import analysis_keys, gradient_impact_vectors, impact_vectors
from experiments import fashion_mnist
from experiments.drawing import COLOURS, new_figure
from experiments.runner import RESULTS, Run, Site
from experiments.settings import EPSILON, FASHION, GTSRB, SHORT

NETWORKS = {
    "cnn, Fashion-MNIST": f"{fashion_mnist.TABLES[0].common} --policy none",
    "LeNet, Fashion-MNIST": f"{FASHION} {EPSILON} --policy none".replace("--model resnet18", "--model lenet"),
    "ResNet18, GTSRB": f"{GTSRB} {SHORT} {EPSILON} --policy none",
}
SCORES = {"loss": impact_vectors, "gradient": gradient_impact_vectors}
RECORDS = {"loss": 8192, "gradient": 2048}  # whose impact vectors are computed
REPEATS, DRAWS, MICROBATCH = 2, 400, 16  # roundings of each record, simulated analyses, examples per pass
BATCHES, NOISES = (64, 256, 1024), (0.5, 2.0, 8.0)
NORMS = {"loss": (0.05, 0.25, 1.0), "gradient": (0.25, 1.0, 2.0)}


def run(site: Site) -> None:
    """Measure the networks whose data are available; write results/ranking.json and results/ranking.png."""
    results = {}
    for title, options in NETWORKS.items():
        training = Run(title, 0, options)
        if (folder := trained(training, site)) is not None:
            print(title, flush=True)
            results[title] = {"command": training.command, **_network(folder)}
    if results:
        (RESULTS / "ranking.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, RESULTS / "ranking.png")


def trained(training: Run, site: Site) -> Path | None:
    """Return the directory of a run with its model, after training it if necessary; None if it cannot be trained."""
    dataclasses.replace(site, kept={}).do([training])
    folder = training.folder(site.work)
    return folder if (folder / "record.json").exists() else None


def settings_and_data(folder: Path) -> tuple[TrainSettings, data.Dataset]:
    """Return the settings and the data set of a run."""
    settings = TrainSettings.chosen({}, from_toml(folder / "config.toml"))
    return settings, data.load(settings.data, image_size=settings.image_size)


def network(folder: Path, settings: TrainSettings, dataset: data.Dataset, format: str) -> nn.Module:
    """Return the network of a run, prepared for a format, in evaluation mode."""
    model = model_of(settings, dataset)
    load_model(model, folder / "model.safetensors")
    return prepare(model.eval(), format=format)


def _network(folder: Path) -> dict:
    """Return the impacts of a trained network's layers by each score, and the rank correlations of private analyses."""
    settings, dataset = settings_and_data(folder)
    model = network(folder, settings, dataset, "luq-fp4")
    names = list(quantizable_layers(model))
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    ids = {score: order[:count].sort().values for score, count in RECORDS.items()}
    lost_P = _gradient_lost(model, dataset.train, ids["gradient"], names, settings.max_grad_norm)
    return {
        "gradient_lost": dict(zip(names, lost_P, strict=True)),
        "scores": {score: _score(score, settings, model, dataset.train, ids[score], names, lost_P) for score in SCORES},
    }


def _score(score: str, settings: TrainSettings, model, split, ids, names: list[str], lost_P: list[float]) -> dict:
    """Return the exhaustive impacts by one score, and the rank correlations of simulated analyses with them."""
    vectors_RNP = np.stack([_vectors(score, model, split, ids, names, repeat) for repeat in range(REPEATS)])
    exhaustive_P = np.nanmean(vectors_RNP, (0, 1))
    analyses = []
    for batch, noise, norm in itertools.product(BATCHES, NOISES, NORMS[score]):
        found = _simulated(np.nan_to_num(vectors_RNP[0]), batch, noise, norm)
        correlations = [_rank(one, exhaustive_P) for one in found]
        quantiles = np.quantile(correlations, [0.1, 0.5, 0.9]).tolist()
        share = _share(settings, batch, noise, norm)
        analyses.append(
            {"batch": batch, "noise_multiplier": noise, "max_norm": norm, "share": share, "rank": quantiles}
        )
        print(
            f"  {score}: batch {batch:5d} noise {noise:3.1f} norm {norm:4.2f}: share {share:7.3%}, "
            f"rank {quantiles[1]:.2f}",
            flush=True,
        )
    halves = [np.nanmean(vectors_RNP[:, part::2], (0, 1)) for part in (0, 1)]
    return {
        "records": len(ids),
        "exhaustive": dict(zip(names, exhaustive_P.tolist(), strict=True)),
        "with_gradient_lost": _rank(exhaustive_P, lost_P),
        "agreement_of_halves": _rank(*halves),
        "median_norm": float(np.nanmedian(np.linalg.norm(vectors_RNP[0], axis=1))),
        "analyses": analyses,
    }


def _rank(one: Any, other: Any) -> float:
    """Return the rank correlation of two sequences."""
    found: Any = stats.spearmanr(one, other)
    return float(found.statistic)


def _vectors(score: str, model, split, ids, names, repeat: int) -> np.ndarray:
    """Return unclipped impact vectors `(N, P)` of N records and P layers."""
    objective = Objective(model, per_example_loss)
    pieces = [
        SCORES[score](objective, Microbatch(split.batch(piece), piece, len(piece)), names, analysis_keys(0, repeat))
        for piece in ids.split(MICROBATCH)
    ]
    return torch.cat(pieces).numpy()


def clipped_gradient(
    model: nn.Module, split: Held, ids: Tensor, max_grad_norm: float, microbatch_size: int | None = None
) -> Tensor:
    """Return the sum of the clipped gradients of some records, all parameters in one vector."""
    found = clipped_sum(
        model,
        per_example_loss,
        split.batch(ids),
        max_grad_norm=max_grad_norm,
        record_ids=ids,
        step=0,
        seed=0,
        microbatch_size=microbatch_size,
    )
    return torch.cat([grad.flatten() for grad in found.grads.values()])


def _gradient_lost(model, split, ids, names, max_grad_norm: float) -> list[float]:
    """Return 1 - <S_p, S> / <S, S> for each layer p; S is the clipped sum in full precision, S_p with p quantized."""
    sums = []
    for policy in [(), *((name,) for name in names)]:
        set_policy(model, policy)
        sums.append(clipped_gradient(model, split, ids, max_grad_norm))
    set_policy(model, ())
    full, *quantized = sums
    return [float(1 - one @ full / (full @ full)) for one in quantized]


def _simulated(vectors_NP: np.ndarray, batch: int, noise: float, norm: float) -> np.ndarray:
    """Return the results `(DRAWS, P)` of simulated analyses with expected batch size `batch`."""
    random = np.random.default_rng(0)
    clipped_NP = vectors_NP * np.minimum(1, norm / np.maximum(np.linalg.norm(vectors_NP, axis=1), 1e-30))[:, None]
    drawn_DN = random.random((DRAWS, len(vectors_NP))) < batch / len(vectors_NP)
    return (drawn_DN @ clipped_NP + random.normal(0, noise * norm, (DRAWS, vectors_NP.shape[1]))) / batch


def _share(settings: TrainSettings, batch: int, noise: float, norm: float) -> float:
    """Return the share of epsilon of one analysis per epoch; 1 if the analyses alone exceed epsilon."""
    analysed = dataclasses.replace(
        settings,
        policy="dpquant",
        fraction=0.5,
        analysis_batch_size=float(batch),
        analysis_noise_multiplier=noise,
        analysis_max_norm=norm,
    )
    try:
        return plan_of(analysed).analysis_share()
    except SettingError:
        return 1.0


def draw(results: dict, path: Path) -> None:
    """Draw what `run` found: how well an analysis ranks the layers, by its share of epsilon."""
    colours = {"loss": COLOURS["vermilion"], "gradient": COLOURS["blue"]}
    figure, axes = new_figure(columns=len(results), width=4.6)
    for axis, (title, result) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for score, marker in zip(SCORES, ("o", "^"), strict=True):
            rows = result["scores"][score]["analyses"]
            shares, ranks = [100 * a["share"] for a in rows], [a["rank"][1] for a in rows]
            axis.plot(shares, ranks, marker, color=colours[score], alpha=0.8)
            best = max(range(len(ranks)), key=ranks.__getitem__)
            axis.annotate(
                f"by the {score}", (shares[best], ranks[best]), (0, 7), textcoords="offset points", ha="center",
                fontsize=8, color=colours[score],
            )  # fmt: skip
        axis.axvline(3, color="grey", linestyle=":")
        axis.set(xscale="log", xlabel="analyses' share of epsilon, %", ylabel="rank correlation (median)")
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(y=0.12)
    figure.savefig(path, dpi=130)
