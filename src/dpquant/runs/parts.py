# SPDX-License-Identifier: Apache-2.0
"""Whether the processes of a run have loaded data that fit together: of one form and, if each has its own, other files.

With `partition=range` every record may lie on one machine only: a record that two processes have is drawn twice. Their
records are not compared, because an error that depends on records reveals something about them. Compared is where the
files lie, which is public: file system and number of a file, on this machine and, of a file that a network serves, on
its server. Copies of a file are not seen.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from dpquant.data.dataset import Dataset
from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings
from dpquant.training.agreement import together
from dpquant.training.distributed import Group
from dpquant.training.partition import RANGE
from dpquant.training.same import check_same

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # of the machine, the same in all of its containers
_MOUNTS = Path("/proc/self/mounts")
_SAID = ("spec", "label_column", "text_columns", "tokenizer_sha256", "buckets", "normalisation")


def check_parts(group: Group, settings: TrainSettings, dataset: Dataset) -> None:
    """Check what the processes of a run have loaded. Every process calls this.

    Raises:
      SettingError: on every process, if one has other classes or another form of records or, with `partition=range`,
        two read the same files.
    Privacy: uses public facts of the data, and no record.
    """
    if group.size == 1:
        return
    form = (dataset.input_shape, dataset.num_classes, dataset.task.kind, dataset.categories, dataset.vocabulary)
    said = {name: dataset.facts.get(name) for name in _SAID}
    facts = {"list of classes": repr(dataset.class_names), "form of records": repr(form)}
    check_same(group, {**facts, "description of the data": json.dumps(said, sort_keys=True)})
    if settings.partition != RANGE:
        return
    own = together(group, lambda: [hashlib.sha256(one.encode()).hexdigest() for one in _places(settings.data)])
    everywhere = [set(json.loads(answer)) for answer in group.from_all(json.dumps(own).encode())]
    for rank, theirs in enumerate(everywhere):
        for other in range(rank):
            if theirs & everywhere[other]:
                raise SettingError(
                    "Expected every process to have records of its own with partition=range; got the same files on "
                    f"processes {other} and {rank}. Each record would be drawn by both. Start one process on each "
                    "machine (--nproc-per-node 1), with other data, or leave partition out."
                )


def _places(data: str, mounts: Path = _MOUNTS) -> Iterator[str]:
    """Yield names of the place where a data set's files lie, of which two are equal only for the same files."""
    path = Path(data.partition(":")[2]).expanduser().resolve()
    machine = _BOOT.read_text(encoding="utf-8").strip() if _BOOT.exists() else platform.node()
    for one in (path, path / "train"):
        if not one.exists():
            continue
        facts = os.stat(one)
        yield f"{machine} {facts.st_dev} {facts.st_ino}"
        if server := _server(one, mounts):
            yield f"{server} {facts.st_ino}"


def _server(path: Path, mounts: Path) -> str:
    """Return what serves a file over a network, as host:/export, or ""."""
    if not mounts.exists():
        return ""
    found, longest = "", -1
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        source, place = (word.replace("\\040", " ") for word in line.split(" ")[:2])
        if path.is_relative_to(place) and len(place) >= longest:
            found, longest = source, len(place)
    return found if ":" in found or found.startswith("//") else ""
