"""Who we are: an Ed25519 key (RFC 8032), the epochs used with it, and a small memory for each topic.

An epoch is taken once per start and never again, also by a machine whose clock was set back, because the last one is kept beside the
key and committed before the new one is used. Kept in memory, or in a SQLite file that several processes may share.
"""

import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from nacl.exceptions import CryptoError
from nacl.signing import SigningKey

from ..core.keys import format_author
from ..errors import IdentityError

MAX_LEDGER_SIZE = 1024 * 1024
"""Bytes of one topic's ledger."""

MAX_LEDGERS = 1024
"""Topics with a ledger; the one saved longest ago is evicted, lest a program that makes up topics fills the disk."""

_APPLICATION_ID = 0x534F4C59  # "SOLY" in the SQLite header tells our files from others
_VERSION = 1
_BUSY_TIMEOUT = 5.0  # seconds to wait for another process's transaction; ours take milliseconds
_MAX_EPOCH = 2**63 - 1  # SQLite's largest integer

_SCHEMA = (
    "CREATE TABLE identity (id INTEGER PRIMARY KEY CHECK (id = 1), seed BLOB NOT NULL, public_key BLOB NOT NULL, epoch INTEGER NOT NULL)",
    "CREATE TABLE ledger (topic_id BLOB PRIMARY KEY, blob BLOB NOT NULL, saved INTEGER NOT NULL)",
    "CREATE INDEX ledger_saved ON ledger (saved)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)

# Closing any descriptor of a file drops all POSIX locks this process has on it, SQLite's too. A new file is created and closed under
# this lock, before any thread can have connected to it; files that exist are only ever opened by SQLite, which takes care.
_creating = threading.Lock()

log = logging.getLogger("solyd_swarm.store.identity")


class Identity:
    """A signing key and what must outlive a restart. Methods may be called from any thread, and block while they use the disk.

    Attributes:
        public_key: the 32-byte Ed25519 public key.
        author: the same as text, ``"<base64>.ed25519"``.
    """

    def __init__(self, connection: sqlite3.Connection, path: str | None, now_us: Callable[[], int]) -> None:
        """Use `Identity.open`. Takes over the connection, also when it raises `IdentityError`."""
        self._connection: sqlite3.Connection = connection
        self._path = path
        self._now_us = now_us
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._key = self._load()
        except BaseException:
            self.close()
            raise
        self.public_key: bytes = bytes(self._key.verify_key)
        self.author: str = format_author(self.public_key)
        log.debug("identity %s, kept in %s", self.author, path or "memory")

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, *, now_us: Callable[[], int]) -> "Identity":
        """The identity kept in a file, created with mode 0600 if there is none; ``None``: a fresh one in memory.

        A file that others may read is closed to them, with a WARNING. A file that is not an identity is left as it is.

        Args:
            now_us: the wall clock, in microseconds since 1970.

        Raises:
            IdentityError: the directory does not exist, the file cannot be created, read or written, or is something else.
        """
        if path is None:
            return cls(_connect(":memory:"), None, now_us)
        full = os.path.abspath(path)
        with _creating:
            _create(full)
        # mode=rw: SQLite itself would create a file with a mode of its own. Bytes of any encoding survive the quoting.
        return cls(_connect(f"file:{quote(os.fsencode(full))}?mode=rw", full), full, now_us)

    def __repr__(self) -> str:
        return f"<Identity {self.author}>"

    def sign(self, data: bytes) -> bytes:
        """The 64-byte detached Ed25519 signature of ``data``. Works after `close` too."""
        return self._key.sign(data).signature

    def next_epoch(self) -> int:
        """``max(now in microseconds, last epoch + 1)``, on the disk before it is returned: no other call ever gets the same.

        Raises:
            IdentityError: it cannot be stored; then it must not be used either.
        """
        with self.transaction() as connection:
            last: int = connection.execute("SELECT epoch FROM identity").fetchone()[0]
            epoch = max(self._now_us(), last + 1)
            if epoch > _MAX_EPOCH:
                raise IdentityError(f"no epoch is left in {self._where}: the clock was once far in the future; start with a new file")
            connection.execute("UPDATE identity SET epoch = ?", (epoch,))
        log.debug("epoch %d of %s", epoch, self.author)
        return epoch

    def load_ledger(self, topic_id: bytes) -> bytes | None:
        """What was last saved for a topic, if it was not evicted. Raises `IdentityError`."""
        with self.access() as connection:
            row = connection.execute("SELECT blob FROM ledger WHERE topic_id = ?", (topic_id,)).fetchone()
        return None if row is None else bytes(row[0])

    def save_ledger(self, topic_id: bytes, blob: bytes) -> None:
        """Keeps ``blob`` for a topic; past `MAX_LEDGERS` topics the one saved longest ago is evicted.

        Raises:
            IdentityError: it cannot be stored; what was saved before still is.
            ValueError: it is larger than `MAX_LEDGER_SIZE`.
        """
        if len(blob) > MAX_LEDGER_SIZE:
            raise ValueError(f"a ledger of {len(blob)} bytes is larger than {MAX_LEDGER_SIZE}")
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO ledger SELECT ?, ?, coalesce(max(saved), 0) + 1 FROM ledger",
                (topic_id, blob),
            )
            connection.execute(
                "DELETE FROM ledger WHERE topic_id IN (SELECT topic_id FROM ledger ORDER BY saved DESC LIMIT -1 OFFSET ?)",
                (MAX_LEDGERS,),
            )

    def close(self) -> None:
        """Lets go of the file. Idempotent."""
        with self._lock:
            self._closed = True
            self._connection.close()

    @property
    def _where(self) -> str:
        return f"the identity file {self._path}" if self._path else "the identity in memory"

    @contextmanager
    def access(self) -> Iterator[sqlite3.Connection]:
        """The connection, to one thread at a time; errors of SQLite become `IdentityError`."""
        with self._lock:
            if self._closed:
                raise IdentityError(f"{self._where} is closed: open it again")
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise _explain(error, self._where) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, with the file locked against other processes; committed and synced at the end, else rolled back."""
        with self.access() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _load(self) -> SigningKey:
        with self.transaction() as connection:
            if _is_empty(connection):
                # Nobody may be able to read the file from before the key is in it.
                self._close_to_others(holds_key=False)
                key = SigningKey.generate()
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO identity VALUES (1, ?, ?, 0)", (bytes(key), bytes(key.verify_key)))
                return key
            key = self._read(connection)
            self._close_to_others(holds_key=True)
            return key

    def _read(self, connection: sqlite3.Connection) -> SigningKey:
        if connection.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
            raise IdentityError(f"{self._path} is a database of something else, and is left as it is: give another path")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            raise IdentityError(f"{self._where} has format {version}, this library knows {_VERSION} only: upgrade it, or give another path")
        row = connection.execute("SELECT seed, public_key, epoch FROM identity").fetchone()
        try:
            seed, public_key, epoch = row
            key = SigningKey(seed)
            if bytes(key.verify_key) != public_key or not 0 <= epoch <= _MAX_EPOCH:
                raise ValueError("key and public key do not belong together, or the epoch is out of range")
        except (TypeError, ValueError, CryptoError) as error:
            # The cause is not chained, lest a traceback with locals shows a key.
            raise IdentityError(
                f"{self._where} is damaged ({type(error).__name__}): restore it from a copy, or give another path"
            ) from None
        return key

    def _close_to_others(self, *, holds_key: bool) -> None:
        if self._path is None:
            return
        try:
            mode = stat.S_IMODE(os.stat(self._path).st_mode)
            if mode & 0o077:
                os.chmod(self._path, 0o600)
        except OSError as error:
            raise IdentityError(f"{self._where} cannot be closed to other users ({error.strerror}): chmod it to 0600 yourself") from error
        if mode & 0o077 and holds_key:
            log.warning("other users could read %s (mode %04o): it has mode 0600 now; if they may have, use a new one", self._where, mode)


def _create(path: str) -> None:
    """Makes an empty file of mode 0600, unless there is a file; raises `IdentityError` where there cannot be one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        if not os.path.exists(path):
            raise IdentityError(f"the identity file {path} is a link to nowhere: create what it points to, or remove it") from None
        if not os.path.isfile(path):
            raise IdentityError(f"the identity file {path} is no regular file: give the path of a file") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IdentityError(f"the identity file cannot be created: {Path(path).parent} is no directory; create it first") from error
    except OSError as error:
        raise IdentityError(f"the identity file {path} cannot be created ({error.strerror}): give a path that can be written") from error
    except ValueError as error:
        raise IdentityError(f"the identity file {path!r} cannot be created ({error}): give another path") from error
    else:
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
        finally:
            os.close(descriptor)


def _connect(database: str, path: str | None = None) -> sqlite3.Connection:
    where = f"the identity file {path}"
    try:
        connection = sqlite3.connect(database, uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _explain(error, where) from error
    try:
        # EXTRA, not FULL: only it also syncs the directory after the journal was deleted, which is what commits
        # (https://www.sqlite.org/pragma.html#pragma_synchronous). fullfsync is what syncs on macOS.
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA fullfsync = ON")
    except sqlite3.Error as error:
        connection.close()
        raise _explain(error, where) from error
    return connection


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Just created, by us or by another process that has not written yet, or crashed before it could."""
    pages = connection.execute("PRAGMA page_count").fetchone()
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    marks = [connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")]
    return pages in ((0,), (1,)) and tables == (0,) and marks == [(0,), (0,)]


_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    sqlite3.SQLITE_NOTADB: "it is a file of something else, and is left as it is: give another path",
    sqlite3.SQLITE_CORRUPT: "it is damaged: restore it from a copy, or give another path",
    sqlite3.SQLITE_READONLY: "it may not be written, or was moved or removed: check its permissions, and those of its directory",
    sqlite3.SQLITE_PERM: "it may not be read and written: check its permissions, and those of its directory",
    sqlite3.SQLITE_CANTOPEN: "it may not be read and written: check its permissions, and those of its directory",
    sqlite3.SQLITE_BUSY: "another program holds it locked: end that one first",
    sqlite3.SQLITE_IOERR: "reading or writing failed: check the disk",
}


def _explain(error: sqlite3.Error, where: str) -> IdentityError:
    code = getattr(error, "sqlite_errorcode", None)  # Python's own complaints have none
    advice = None if code is None else _ADVICE.get(code & 0xFF)  # the rest are details
    return IdentityError(f"{where} cannot be used: {advice or 'give another path'} (SQLite: {error})")
