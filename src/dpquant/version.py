# SPDX-License-Identifier: Apache-2.0
"""The version of dpquant that runs, which every record, ledger and page names.

A build takes its version from the commit. An editable install is built once while its sources move on, so the commit is
asked of git there: a record must name the code that made it.
"""

import functools
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path


@functools.cache
def version(package: Path = Path(__file__).parent, *, git: str = "git") -> str:
    """Return the version, as 0.1.0; in a checkout with its commit, as 0.1.dev0+g1a2b3c4d5, and .dirty after changes.

    Args:
      package: folder of the package.
      git: the program that is asked.
    """
    installed = importlib.metadata.version("dpquant")
    checkout = package.parent.parent
    if package.parent.name != "src" or not (checkout / ".git").exists():
        return installed
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's repository
    command = [git, "-C", str(checkout), "describe", "--always", "--dirty=.dirty", "--exclude=*", "--abbrev=9"]
    try:
        commit = subprocess.run(
            command, capture_output=True, check=True, text=True, env=foreign | {"GIT_OPTIONAL_LOCKS": "0"}
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or it does not trust the owner of the folder
        return installed
    return f"{re.sub(r'[.]dev[0-9]+$', '.dev0', installed.split('+')[0])}+g{commit}"
