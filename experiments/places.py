# SPDX-License-Identifier: Apache-2.0
"""Folders that names in capitals stand for in the options of runs: data, weights, and features made of both."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from experiments.features import FEATURES
from experiments.packages import PACKAGES


@dataclasses.dataclass
class Places:
    """Makes folders of what is downloaded, each once.

    Attributes:
      work: folder of what is made.
      downloads: {whether of weights: folder of the packages}.
      folders: {name: folder}, of those that are there.
    """

    work: Path
    downloads: Mapping[bool, Path | None]
    folders: dict[str, Path]

    def make(self, name: str) -> Path | None:
        """Return a name's folder, made if need be; None, with a line printed, if what it is made of is missing."""
        out = self.work / name
        if name not in self.folders and out.exists():
            self.folders[name] = out
        if name not in self.folders and (name in PACKAGES or name in FEATURES):
            draft = self.work / f"{name}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
            if self._made(name, draft):
                self.folders[name] = draft.replace(out)
        return self.folders.get(name)

    def _made(self, name: str, draft: Path) -> bool:
        if name in FEATURES:
            sources = [self.make(one) for one in FEATURES[name].needs]
            found = [one for one in sources if one is not None]
            if len(found) < len(sources):
                return False
            records, weights = found
            FEATURES[name].make(records, weights, draft)
            return True
        package = PACKAGES[name]
        file = package.found(self.downloads[package.weights])
        if file is None:
            option = "--weights" if package.weights else "--data-dir"
            print(f"left out, as {option} has no {package.file} (experiments/README.md says how it is got): {name}")
            return False
        package.make(file, draft)
        return True
