"""Every example in the README and in docstrings runs, and the documents are valid reStructuredText.

A comment before a Python block of the README says how it is run: ``.. test: once``, ``twice`` (two copies, which meet), or
``twice until TEXT`` (each prints a line that begins so, and then lives on until Ctrl-C). Blocks of ``pycon`` are doctests.
"""

import ast
import doctest
import importlib
import io
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docutils.core
import docutils.nodes
import pytest

import solyd_swarm
from solyd_swarm import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.rst").read_text("utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.rst")), *sorted((ROOT / "docs").glob("*.rst"))]
PATIENCE = 20.0
"""Seconds that an example may take on a busy machine."""

SETTINGS = {"report_level": 2, "halt_level": 2, "syntax_highlight": "none", "warning_stream": io.StringIO()}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    how: str

    def __str__(self) -> str:
        return f"{self.language}: {self.code.splitlines()[0]}"


def blocks(text: str) -> Iterator[Block]:
    """The code blocks of a document, each with what the comment right before it says."""
    how = ""
    for node in docutils.core.publish_doctree(text, settings_overrides=SETTINGS).findall():
        if isinstance(node, docutils.nodes.comment) and node.astext().startswith("test:"):
            how = node.astext().removeprefix("test:").strip()
        elif isinstance(node, docutils.nodes.literal_block) and "code" in node["classes"]:
            language = next(name for name in node["classes"] if name != "code")
            yield Block(language, node.astext(), how)
            how = ""


BLOCKS = list(blocks(README))
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "shell"]
PYCON = [block for block in BLOCKS if block.language == "pycon"]


def test_blocks_are_found() -> None:
    assert {block.language for block in BLOCKS} == {"python", "shell", "pycon"}
    assert README.count(".. code-block::") == len(BLOCKS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_valid(path: Path) -> None:
    docutils.core.publish_string(path.read_text("utf-8"), str(path), writer="html5", settings_overrides=SETTINGS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_link_to_exist(path: Path) -> None:
    for target in re.findall(r"<([\w./-]+)>`_", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, tmp_path: Path) -> None:
    code = block.code.replace('"foobar"', f'"{uuid.uuid4()}"')
    if block.how == "once":
        run([sys.executable, "-c", code], tmp_path)
    elif block.how == "twice":
        with running(code, tmp_path) as one, running(code, tmp_path) as other:
            assert (one.process.wait(PATIENCE), other.process.wait(PATIENCE)) == (0, 0)
    else:
        expected = block.how.removeprefix("twice until ")
        assert expected != block.how, "a comment before the block must say how to run it"
        with running(code, tmp_path) as one, running(code, tmp_path) as other:
            for each in (one, other):
                assert each.next_line().startswith(expected)
                each.process.send_signal(signal.SIGINT)
            assert (one.process.wait(PATIENCE), other.process.wait(PATIENCE)) == (130, 130)


def test_the_example_runs(tmp_path: Path) -> None:
    code = (ROOT / "example.py").read_text("utf-8").replace('"foobar"', f'"{uuid.uuid4()}"')
    with running(code, tmp_path) as one, running(code, tmp_path) as other:
        for each in (one, other):
            assert each.next_line() == "connected\n"
            assert each.next_line().startswith("message {'data': 'hello warld from ")
        assert (one.process.wait(PATIENCE), other.process.wait(PATIENCE)) == (0, 0)


def test_the_example_is_short() -> None:
    assert len((ROOT / "example.py").read_text("utf-8").splitlines()) <= 20


@pytest.mark.parametrize("block", PYCON, ids=str)
def test_sessions_run(block: Block, tmp_path: Path) -> None:
    (tmp_path / "session.txt").write_text(block.code.replace('"foobar"', f'"{uuid.uuid4()}"') + "\n", "utf-8")
    run([sys.executable, "-m", "doctest", "session.txt"], tmp_path)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_are_shell(block: Block) -> None:
    for shell in ("sh", "bash"):
        subprocess.run([shell, "-n", "-c", block.code], check=True, timeout=PATIENCE)


def test_commands_have_the_options_shown() -> None:
    found = 0
    for block in SHELL:
        for line in block.code.splitlines():
            words = shlex.split(line, comments=True)
            while "solyd-swarm" in words:
                words = words[words.index("solyd-swarm") + 1 :]
                end = next((place for place, word in enumerate(words) if word in ("|", "&&", ";", "&") or word.startswith("<")), len(words))
                cli._parser().parse_args(words[:end])
                found += 1
    assert found >= 5


def modules() -> list[str]:
    package = Path(solyd_swarm.__file__).parent
    files = [path.relative_to(package.parent) for path in sorted(package.rglob("*.py")) if ">>> " in path.read_text("utf-8")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name: str, tmp_path: Path) -> None:
    assert doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    code = f"import doctest, importlib, sys; sys.exit(bool(doctest.testmod(importlib.import_module({name!r})).failed))"
    run([sys.executable, "-c", code], tmp_path)


def test_readme_names_what_there_is() -> None:
    """Every public name is told about, every event and every option."""
    from solyd_swarm.emitter import EVENTS

    for name in solyd_swarm.__all__:
        assert re.search(rf"\b{name}\b", README), name
    for event in EVENTS:
        assert f"``{event}(" in README, event
    tree = ast.parse((ROOT / "solyd_swarm" / "pubsub.py").read_text("utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "pubsub"]
    for argument in function.args.kwonlyargs:
        assert re.search(rf"``{argument.arg}\b", README), argument.arg


def test_ci_runs_what_the_readme_says() -> None:
    (command,) = re.findall(r"^    (.*-m pytest)$", README, re.MULTILINE)
    printed = subprocess.run([ROOT / ".ci" / "run", "--print"], stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE).stdout
    assert printed.strip() == command


# ---- processes


def run(arguments: list[str], directory: Path) -> None:
    done = subprocess.run(arguments, cwd=directory, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}


class Script:
    """A running script; its output is read by a thread."""

    def __init__(self, code: str, directory: Path) -> None:
        # A shell without job control, and so whatever runs the tests in its background, has SIGINT ignored.
        reset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        path = directory / f"script-{uuid.uuid4()}.py"
        path.write_text(reset + code, "utf-8")
        self.process = subprocess.Popen([sys.executable, path], cwd=directory, env=environment(), stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self._lines.put(line)

    def next_line(self) -> str:
        return self._lines.get(timeout=PATIENCE)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(code: str, directory: Path) -> Iterator[Script]:
    script = Script(code, directory)
    try:
        yield script
    finally:
        script.end()
