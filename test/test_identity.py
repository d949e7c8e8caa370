"""An identity outlives restarts, clocks set back, full disks and other processes, and nobody else can read it."""

import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nacl.signing import VerifyKey

from solyd_swarm.core.keys import parse_author
from solyd_swarm.errors import IdentityError, SwarmError
from solyd_swarm.store import identity as module
from solyd_swarm.store.identity import MAX_LEDGER_SIZE, MAX_LEDGERS, Identity

TIMEOUT = 60


def run(code: str, *args: object, wrap: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*wrap, sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "me"


@pytest.fixture
def open_identity(path: Path) -> Iterator[Callable[..., Identity]]:
    opened: list[Identity] = []

    def open_it(where: str | os.PathLike[str] | None = path, now: int = 1_000) -> Identity:
        opened.append(Identity.open(where, now_us=lambda: now))
        return opened[-1]

    yield open_it
    for identity in opened:
        identity.close()


Open = Callable[..., Identity]


def test_signs_what_others_can_verify(open_identity: Open) -> None:
    for where in (None, open_identity()._path):
        identity = open_identity(where)
        assert len(identity.public_key) == 32
        assert parse_author(identity.author) == identity.public_key
        signature = identity.sign(b"data")
        assert len(signature) == 64
        VerifyKey(identity.public_key).verify(b"data", signature)


def test_key_and_memory_outlive_a_restart(open_identity: Open) -> None:
    first = open_identity()
    first.save_ledger(b"topic", b"\x00blob")
    first.close()
    again = open_identity()
    assert again.public_key == first.public_key
    assert again.sign(b"x") == first.sign(b"x")
    assert again.load_ledger(b"topic") == b"\x00blob"
    assert again.load_ledger(b"other") is None


def test_in_memory_each_is_new(open_identity: Open) -> None:
    first, second = open_identity(None), open_identity(None)
    assert first.public_key != second.public_key
    first.save_ledger(b"t", b"1")
    assert first.load_ledger(b"t") == b"1"
    assert second.load_ledger(b"t") is None
    assert [first.next_epoch(), first.next_epoch()] == [1_000, 1_001]


@pytest.mark.parametrize("name", [":memory:", "with space?mode=memory&x=%41#y", "d\udcffr"])
def test_odd_file_names(open_identity: Open, tmp_path: Path, name: str) -> None:
    try:
        first = open_identity(tmp_path / name)
    except IdentityError:
        pytest.skip("this file system takes no such name")
    assert os.listdir(tmp_path) == [name]
    assert open_identity(str(tmp_path / name)).author == first.author


def test_epochs_follow_the_clock_and_outlive_one_set_back(open_identity: Open) -> None:
    assert open_identity(now=5_000).next_epoch() == 5_000
    back = open_identity(now=10)
    assert [back.next_epoch(), back.next_epoch()] == [5_001, 5_002]
    assert open_identity(now=-5).next_epoch() == 5_003
    assert open_identity(now=9_000).next_epoch() == 9_000


def test_the_last_epoch_of_all(open_identity: Open) -> None:
    identity = open_identity(now=2**63 - 1)
    assert identity.next_epoch() == 2**63 - 1
    for _ in range(2):
        with pytest.raises(IdentityError, match="no epoch is left"):
            identity.next_epoch()


def test_an_epoch_is_stored_before_it_is_returned(path: Path, open_identity: Open) -> None:
    killed = run(
        "import os, sys\nfrom solyd_swarm.store.identity import Identity\n"
        "print(Identity.open(sys.argv[1], now_us=lambda: 77).next_epoch(), flush=True)\nos.kill(os.getpid(), 9)",
        path,
    )
    out, err = killed.communicate(timeout=TIMEOUT)
    assert (out, killed.returncode) == ("77\n", -signal.SIGKILL), err
    identity = open_identity(now=0)
    assert identity.next_epoch() == 78
    assert identity._connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    assert identity._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


ALLOCATE = """
import sys
from solyd_swarm.store.identity import Identity
print("ready", flush=True)
sys.stdin.readline()
identity = Identity.open(sys.argv[1], now_us=lambda: 1000)
print(identity.author, *(identity.next_epoch() for _ in range(40)))
identity.close()
"""


def test_processes_share_one_file_from_its_creation_on(path: Path) -> None:
    processes = [run(ALLOCATE, path) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    lines = [out.split() for out, _ in results]
    assert len({line[0] for line in lines}) == 1
    epochs = [[int(epoch) for epoch in line[1:]] for line in lines]
    assert all(each == sorted(each) for each in epochs)
    assert sorted(epoch for each in epochs for epoch in each) == list(range(1_000, 1_120))


def test_threads_share_one_file(open_identity: Open) -> None:
    barrier = threading.Barrier(4)

    def allocate(_: int) -> list[int]:
        barrier.wait(TIMEOUT)
        identity = open_identity()
        return [identity.next_epoch() for _ in range(10)]

    one = open_identity()
    with ThreadPoolExecutor(4) as pool:
        apart = [epoch for each in pool.map(allocate, range(4)) for epoch in each]
        together = list(pool.map(lambda _: one.next_epoch(), range(20)))
    assert sorted(apart + together) == list(range(1_000, 1_060))


@pytest.mark.parametrize("mask", [0, 0o777])
def test_mode_is_0600_whatever_the_umask(path: Path, open_identity: Open, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    connect = module._connect

    def spy(*args: str) -> sqlite3.Connection:
        modes.append(stat.S_IMODE(path.stat().st_mode))  # before anything is in it
        return connect(*args)

    monkeypatch.setattr(module, "_connect", spy)
    before = os.umask(mask)
    try:
        identity = open_identity()
    finally:
        os.umask(before)
    identity.next_epoch()
    assert modes == [0o600]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_others_can_read_is_closed_to_them(path: Path, open_identity: Open, caplog: pytest.LogCaptureFixture) -> None:
    author = open_identity().author
    assert not caplog.records
    path.chmod(0o644)
    assert open_identity().author == author
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0644" in record.getMessage()
    assert str(path) in record.getMessage()


def test_an_empty_file_is_filled(path: Path, open_identity: Open) -> None:
    path.touch(0o644)
    author = open_identity().author
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_identity().author == author


def foreign(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"Dear diary\n"),
        lambda path: path.write_bytes(os.urandom(20_000)),
        lambda path: path.write_bytes(b"SQLite format 3\x00" + bytes(4080)),
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: foreign(path, "CREATE TABLE other (x)"),
        lambda path: foreign(path, "PRAGMA application_id = 5"),
        lambda path: foreign(path, "PRAGMA user_version = 1"),
        lambda path: foreign(path, "CREATE TABLE other (x)", "DROP TABLE other", "PRAGMA application_id = 5"),
    ],
    ids=["text", "noise", "header", "zeros", "tables", "application", "version", "dropped"],
)
def test_a_foreign_file_is_left_as_it_is(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    path.chmod(0o644)
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="give another path"):
        Identity.open(path, now_us=lambda: 1)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE identity SET seed = zeroblob(32)",
        "UPDATE identity SET seed = 'text'",
        "UPDATE identity SET seed = x'00'",
        "UPDATE identity SET epoch = -1",
        "UPDATE identity SET epoch = 'soon'",
        "DELETE FROM identity",
        "DROP TABLE identity",
        "PRAGMA user_version = 2",
    ],
)
def test_a_damaged_identity_is_not_replaced(path: Path, open_identity: Open, damage: str) -> None:
    open_identity().close()
    foreign(path, damage)
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="another path"):
        open_identity()
    assert path.read_bytes() == before


def test_a_truncated_or_overwritten_identity(path: Path, open_identity: Open) -> None:
    open_identity().close()
    whole = path.read_bytes()
    for damaged in (whole[:5000], whole[:-4096], whole[:4096] + os.urandom(len(whole) - 4096)):
        path.write_bytes(damaged)
        with pytest.raises(IdentityError):
            open_identity()
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("no/such/file", "no is no directory|such is no directory; create it first"),
        ("file/inside", "file is no directory; create it first"),
        (".", "no regular file"),
        ("fifo", "no regular file"),
        ("dangling", "link to nowhere"),
        ("nul\0", "give another path"),
        ("x" * 300, "cannot be created"),
        ("/proc/solyd_swarm_test", "/proc"),
        ("/dev/null", "no regular file"),
    ],
)
def test_impossible_paths(tmp_path: Path, where: str, text: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    if where.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(IdentityError, match=text) as caught:
        Identity.open(os.path.join(tmp_path, where), now_us=lambda: 1)
    assert isinstance(caught.value, (OSError, SwarmError))
    assert not (tmp_path / "nowhere").exists()


UNPRIVILEGED = """
import os, sys
from solyd_swarm.errors import IdentityError
from solyd_swarm.store.identity import Identity
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        Identity.open(path, now_us=lambda: 1)
    except IdentityError as error:
        print(error)
"""


def test_permission_denied(path: Path, open_identity: Open) -> None:
    """In a directory that may not be written, and a file that may not be read; as another user where we are root."""
    open_identity().close()
    path.chmod(0)
    os.chmod(path.parent, 0o555)
    process = run(UNPRIVILEGED, path.parent / "new", path)
    out, err = process.communicate(timeout=TIMEOUT)
    os.chmod(path.parent, 0o755)
    if "import" in err and "Error" in err:
        pytest.skip("another user cannot import from here")
    lines = out.splitlines()
    assert len(lines) == 2, err
    assert all("denied" in line or "check its permissions" in line for line in lines), lines


FULL = """
import os, sys, subprocess
from solyd_swarm.errors import IdentityError
from solyd_swarm.store.identity import Identity
where = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", where], check=True)
print("mounted")
def fill():
    with open(where + "/ballast", "ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(512))
        except OSError:
            pass
def attempt(action):
    try:
        print(action())
    except IdentityError as error:
        print(type(error).__name__, error)
identity = Identity.open(where + "/me", now_us=lambda: 50)
print(identity.next_epoch())
identity.save_ledger(b"t", b"before")
fill()
attempt(identity.next_epoch)
attempt(lambda: identity.save_ledger(b"t", bytes(60000)))
attempt(lambda: Identity.open(where + "/other", now_us=lambda: 1))
print(identity.load_ledger(b"t"))
os.remove(where + "/ballast")
print(identity.next_epoch() > 50)
attempt(lambda: Identity.open(where + "/other", now_us=lambda: 9).next_epoch())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or os.getuid() != 0:
        pytest.skip("mounting a small disk takes root and unshare")
    process = run(FULL, tmp_path, wrap=("unshare", "-m"))
    out, err = process.communicate(timeout=TIMEOUT)
    if not out.startswith("mounted"):
        pytest.skip(f"no disk can be mounted here: {err}")
    lines = out.splitlines()[1:]
    assert process.returncode == 0, err
    assert lines[0] == "50"
    assert [line.startswith("IdentityError ") and "free some space" in line for line in lines[1:4]] == [True] * 3, lines
    assert lines[4:] == ["b'before'", "True", "9"]


def test_a_file_locked_by_another_program(path: Path, open_identity: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY_TIMEOUT", 0.05)
    identity = open_identity()
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(IdentityError, match="locked"):
            identity.next_epoch()
        with pytest.raises(IdentityError, match="locked"):
            open_identity()
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert identity.next_epoch() == 1_000


def test_a_file_removed_while_open(path: Path, open_identity: Open) -> None:
    identity = open_identity()
    identity.next_epoch()
    path.unlink()
    with pytest.raises(IdentityError, match="removed"):
        identity.next_epoch()


def test_ledgers_are_bounded(open_identity: Open) -> None:
    for identity in (open_identity(None), open_identity()):
        identity.save_ledger(b"large", bytes(MAX_LEDGER_SIZE))
        with pytest.raises(ValueError, match="larger"):
            identity.save_ledger(b"large", bytes(MAX_LEDGER_SIZE + 1))
        assert identity.load_ledger(b"large") == bytes(MAX_LEDGER_SIZE)


def test_the_ledger_saved_longest_ago_is_evicted(open_identity: Open) -> None:
    identity = open_identity(None)
    for number in range(MAX_LEDGERS):
        identity.save_ledger(b"%d" % number, b"x")
    identity.save_ledger(b"0", b"again")
    identity.save_ledger(b"new", b"x")
    assert identity.load_ledger(b"1") is None
    assert identity.load_ledger(b"0") == b"again"
    assert identity.load_ledger(b"2") == identity.load_ledger(b"new") == b"x"
    identity.save_ledger(b"newer", b"x")
    assert identity.load_ledger(b"2") is None


def test_closed(open_identity: Open) -> None:
    for identity in (open_identity(None), open_identity()):
        identity.close()
        identity.close()
        with pytest.raises(IdentityError, match="closed"):
            identity.next_epoch()
        with pytest.raises(IdentityError, match="closed"):
            identity.load_ledger(b"")
        with pytest.raises(IdentityError, match="closed"):
            identity.save_ledger(b"", b"")
        assert len(identity.sign(b"")) == 64


def test_no_key_is_shown(path: Path, open_identity: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    identity = open_identity()
    identity.next_epoch()
    seed = bytes(identity._key)
    assert repr(identity) == f"<Identity {identity.author}>"
    assert identity.author in caplog.text
    assert seed.hex() not in caplog.text
    assert repr(seed) not in caplog.text
