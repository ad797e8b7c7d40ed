# SPDX-License-Identifier: Apache-2.0
"""The file of results of a GPU, written anew after every result, so that an interrupted measurement leaves the most."""

import json
from pathlib import Path
from typing import Any


class Report:
    """A JSON file `{stage: {key: result}}`; stages of other processes are kept."""

    def __init__(self, path: Path):
        """Open the report at `path`, which may be absent."""
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return everything in the file; {} if there is none."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, stage: str, key: str, result: Any) -> None:
        """Add a result and write the file, atomically."""
        everything = self.read()
        everything.setdefault(stage, {})[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text(json.dumps(everything, indent=1) + "\n")
        draft.replace(self.path)
