# SPDX-License-Identifier: Apache-2.0
"""Every block of code of README.md and of the pages in docs/ runs, in the order of its page.

```bash runs in a shell, where `dpquant` forks a process that is warm; ```python runs in one namespace a page; ```toml
and ```json are read. A block with title="NAME" is also written to that file. ```console is what cannot run in a test
(it installs, opens a browser, needs a GPU, other data or hours), and is only shown.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from sources import images, table
from words import bert_in, tokenizer_in

ROOT = Path(__file__).parents[1]
ONLY_SHOWN = {
    "console",
    "py",
    "yaml",
    "",
}  # py: a script of examples/, shown; a block of bash runs it. yaml: test_docs.py
NO_CODE = {"log.md", "mutations.md", "command-line.md", "api.md"}  # made from elsewhere, or of another time
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in NO_CODE)]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))
ALWAYS = {"README.md", "docs/start.md"}  # run every time; the others are in tests/long.txt
SMALLER = {
    "make.py photos": "make.py photos --records 150",
    "make.py fraud": "make.py fraud --records 300",
    "make.py mails": "make.py mails --records 100",
    "--records 40000": "--records 60 --image-size 32 --width 0.1",
    "--records 1200000": "--records 60 --width 0.1 --epochs 1",
    "--image-size 224": "--image-size 32",
    "--epochs 20": "--epochs 1",
    "--epochs 10": "--epochs 1",
    "--epochs 5": "--epochs 1",
    "--epochs 2": "--epochs 1",
    "--rounds 8": "--rounds 1",
    "seq 12": "seq 2",
}
"""{what a page says: what runs here, so that a test takes seconds}."""


_TRAIN = "dpquant train --data image-folder:photos --records 60 --image-size 8 --model mlp --width 0.1 --epochs 1"
_TRAINED = f"{_TRAIN} --microbatch-size 8 --noise-multiplier 1 --out runs/photos"


def photos(home: Path, shell: Callable[[str], None]) -> None:
    """Write images of two classes into photos/."""
    images(home)


def trained(home: Path, shell: Callable[[str], None]) -> None:
    """Write photos/, and a run on them into runs/photos."""
    images(home)
    shell(_TRAINED)


def last_year(home: Path, shell: Callable[[str], None]) -> None:
    """Write photos/, and an earlier run into runs/last-year."""
    trained(home, shell)
    (home / "runs" / "photos").rename(home / "runs" / "last-year")


def watched(home: Path, shell: Callable[[str], None]) -> None:
    """Write a run that has ended into runs/fashion."""
    trained(home, shell)
    shutil.copytree(home / "runs" / "photos", home / "runs" / "fashion")


def used(home: Path, shell: Callable[[str], None]) -> None:
    """Write a run, and images that it has not seen: new/*.jpg, and two folders of test images."""
    trained(home, shell)
    (home / "new").mkdir()
    for number, image in enumerate(sorted((home / "photos" / "test").glob("*/*"))):
        shutil.copy(image, home / "new" / f"{number}.jpg")
    for name in ("others", "private"):
        shutil.copytree(home / "photos", home / name)


def every_kind(home: Path, shell: Callable[[str], None]) -> None:
    """Write photos/, the weights of a network, and tables as Parquet."""
    import torchvision
    from pyarrow import csv, parquet

    photos(home, shell)
    table(home)
    loans = csv.read_csv(home / "t.csv").rename_columns({"label": "defaulted"})
    for name in ("loans", "loans-test"):
        parquet.write_table(loans, home / f"{name}.parquet")
    torch.save(torchvision.models.resnet18().state_dict(), home / "resnet18.pth")


def pretrained(home: Path, shell: Callable[[str], None]) -> None:
    """Write a network that stands for one of the user's into my-bert/."""
    bert_in(tokenizer_in(home / "my-bert"))


PREPARED = {
    "README.md": photos,
    "docs/adopting.md": last_year,
    "docs/after-training.md": used,
    "docs/data.md": every_kind,
    "docs/review.md": trained,
    "docs/texts.md": pretrained,
    "docs/watch.md": watched,
}
"""{page: what writes the files that its blocks take as given}."""


class Blocks:
    """Runs the blocks of one page in one folder.

    Attributes:
      run: each language's way to run a block: {language: function of its text}.
    """

    def __init__(self, shell: Callable[[str], None]):
        self.run: dict[str, Callable[[Example], object]] = {
            "bash": lambda example: shell(str(example.parsed)),
            "python": PythonEvaluator(),
            "toml": lambda example: tomllib.loads(str(example.parsed)),
            "json": lambda example: [json.loads(line) for line in str(example.parsed).splitlines()],
        }
        self._lexer = RawFencedCodeBlockLexer(
            re.compile(r'[ \t]*(?P<language>[\w-]*)(?:[ \t]+title="(?P<title>[^"]+)")?[ \t]*$\n', re.MULTILINE)
        )

    def __call__(self, document: Document) -> Iterator[Region]:
        """Return the blocks of a page, as Sybil wants them."""
        for region in self._lexer(document):
            language, title = region.lexemes["language"], region.lexemes["title"]
            region.parsed = region.lexemes["source"]
            region.evaluator = self._evaluator(language, title)
            yield region

    def _evaluator(self, language: str, title: str | None) -> Callable[[Example], None]:
        def evaluate(example: Example) -> None:
            if title is not None and language not in ONLY_SHOWN:
                Path(title).write_text(str(example.parsed), encoding="utf-8")
            if language not in ONLY_SHOWN:
                assert language in self.run, f"nothing runs a block of {language}"
                self.run[language](example)

        return evaluate


def run(page: Path, shell: Callable[[str], None], **names: object) -> int:
    """Run all blocks of a page in the working directory, and return how many there are.

    Args:
      page: Markdown.
      shell: runs a text in a shell; raises an AssertionError if it fails.
      names: what the page's Python takes as given.
    """
    document = Document.parse(str(page), Blocks(shell))
    document.namespace.update(names)
    examples = list(document.examples())
    for example in examples:
        try:
            example.evaluate()
        except Exception as error:
            raise AssertionError(f"{page.name}, line {example.line}: {error}") from error
    return len(examples)


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Iterator[Path]:
    """Return a folder with the programs that blocks call, first of all a warm `dpquant`."""
    folder = tmp_path_factory.mktemp("programs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("warm.py"), folder / "socket", folder / "dpquant"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as server:
        began = time.monotonic()
        while not os.access(folder / "dpquant", os.X_OK) and server.poll() is None and time.monotonic() - began < 300:
            time.sleep(0.05)
        yield folder
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def shell(programs, tmp_path, monkeypatch) -> Callable[[str], None]:
    """Return what runs a text in a shell, in a folder where the examples are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "DPQUANT_CACHE": "off"}

    def run(text: str) -> None:
        for said, smaller in SMALLER.items():
            text = text.replace(said, smaller)
        script = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            script,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}"

    return run


@pytest.fixture
def names() -> dict[str, object]:
    """Return what Python on the pages takes as given."""
    inputs, labels = torch.randn(60, 6), torch.randint(3, (60,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_set": torch.utils.data.TensorDataset(inputs, labels),
    }


def _case(page: Path):
    """Return a page as a parameter of a test, under its path."""
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.always] if name in ALWAYS else [])


@pytest.mark.parametrize("page", [_case(page) for page in PAGES])
def test_every_block_of_a_page_runs(page, shell, names, tmp_path, tried):
    prepare = PREPARED.get(str(page.relative_to(ROOT)))
    if prepare is not None:
        prepare(tmp_path, shell)
    tried("blocks of pages", run(page, shell, **names))


@pytest.mark.parametrize(
    ("block", "flaw"),
    [
        ("```bash\ntrue && test -d examples\n```", None),
        ("```bash\nfalse\ntrue\n```", "line 1"),
        ("```bash\nfalse | cat\n```", "line 1"),
        ("text\n\n```bash\ndpquant plan --epsilom 8\n```", "line 3: .*No such option: --epsilom"),
        ("```python\nassert model(inputs).shape == (60, 3)\n```", "name 'inputs'"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 1\n```", None),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", "line 5"),
        ('```python title="m.py"\ny = 1\n```\n\n```bash\npython -c "import m; assert m.y == 1"\n```', None),
        ("```toml\ndraft = yes\n```", "line 1"),
        ("```json\n{'a': 1}\n```", "line 1"),
        ("```ruby\nputs 1\n```", "nothing runs a block of ruby"),
        ("```console\nfalse\n```", None),
        ("- a list\n\n  ```bash\n  false\n  ```", "line 3"),
    ],
)
def test_a_block_that_does_not_run_is_seen(block, flaw, shell, names, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{block}\n")
    if flaw is None:
        assert run(page, shell, **names) == block.count("```") // 2
    else:
        with pytest.raises(AssertionError, match=re.compile(flaw, re.DOTALL)):
            run(page, shell, **names)


def test_what_is_made_smaller_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [said for said in SMALLER if said not in text] == []
    assert [page for page in PREPARED if ROOT / page not in PAGES] == []


def test_no_code_is_hidden_from_this_test():
    """An indented block of code has no language, and would be shown and never run."""
    indented = re.compile(r"\n\n(?: {4}|\t)(?![-*+\d ]).*(?:dpquant|python|pip) ")
    assert [page.name for page in PAGES if indented.search(page.read_text(encoding="utf-8"))] == []
    assert indented.search("# A page\n\n    dpquant train\n")
