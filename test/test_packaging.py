"""What is built from this tree, without a network: the wheel holds the library and nothing else, the source archive everything."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import solyd_swarm

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the source archive, and the wheel built from that."""
    source, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    shutil.copytree(ROOT / ".ci", source / ".ci")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield out
    shutil.rmtree(source)


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "solyd_swarm").rglob("*.py")}


def test_the_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == modules() | {"solyd_swarm/py.typed"}


def test_the_source_archive_holds_everything(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "test").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    top = {"README.rst", "CHANGELOG.rst", "LICENSE", "example.py", "setup.cfg", "setup.py", "pyproject.toml", "ruff.toml", ".ci/run"}
    assert (modules() | tests | top | {"docs/architecture.rst", "solyd_swarm/py.typed"}) - names == set()
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_one_version_everywhere(metadata: Message) -> None:
    assert metadata["Version"] == solyd_swarm.__version__
    newest = re.search(r"^(\d+\.\d+\.\d+) \(", (ROOT / "CHANGELOG.rst").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == solyd_swarm.__version__


def test_metadata(metadata: Message, wheel: zipfile.ZipFile) -> None:
    assert metadata["Name"] == "solyd-swarm"
    assert metadata["Description-Content-Type"] == "text/x-rst"
    assert metadata.get_payload().strip() == (ROOT / "README.rst").read_text("utf-8").strip()  # type: ignore[union-attr]
    assert metadata["Requires-Python"].replace(" ", "") in ("!=3.12.0,!=3.12.1,>=3.11", ">=3.11,!=3.12.0,!=3.12.1")
    assert set(metadata.get_all("Provides-Extra", [])) == {"test", "fast", "plot", "mainline", "portmap"}
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    assert dict(parser["console_scripts"]) == {"solyd-swarm": "solyd_swarm.cli:main"}
    assert [name for name in wheel.namelist() if name.endswith("/LICENSE")]


def test_what_the_library_imports_is_declared(metadata: Message) -> None:
    """Third-party imports of the package, by the names under which they are installed."""
    imported = set()
    for path in sorted((ROOT / "solyd_swarm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    third_party = {name for name in imported - sys.stdlib_module_names - {"solyd_swarm"} if not name.startswith("_")}
    names = {"nacl": "pynacl", "noise": "noiseprotocol"}
    declared = {re.split(r"[^\w-]", line, maxsplit=1)[0].lower() for line in metadata.get_all("Requires-Dist", [])}
    assert {names.get(name, name).replace("_", "-") for name in third_party} - declared == set()
