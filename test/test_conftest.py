"""The guard in conftest.py catches what a test leaves behind, and blames nobody for what is shared."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = """
import asyncio, os, socket, threading, time
import pytest

kept = []
stop = threading.Event()

def test_thread():
    threading.Thread(target=stop.wait, args=(5,), name="careless").start()

def test_daemon_of_ours():
    threading.Thread(target=stop.wait, args=(5,), name="solyd_swarm loop", daemon=True).start()

def test_socket():
    kept.append(socket.socket())

def test_loop():
    kept.append(asyncio.new_event_loop())

async def forever():
    await asyncio.Event().wait()

async def test_task():
    kept.append(asyncio.create_task(forever(), name="endless"))

async def test_server():
    kept.append(await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0))

@pytest.fixture
async def leaking():
    kept.append(asyncio.create_task(forever(), name="from a fixture"))
    yield

async def test_fixture_task(leaking):
    pass

@pytest.fixture(scope="module")
def shared():
    global never_closed
    never_closed = socket.socket()
    yield

def test_shared_first(shared):
    pass

def test_shared_last(shared):
    pass

def test_after():
    for each in kept:
        if hasattr(each, "close"):
            each.close()
    stop.set()
"""

CLEAN = """
import asyncio, os, socket, threading
from concurrent.futures import ThreadPoolExecutor
import pytest, pytest_asyncio

def test_environment():
    assert os.environ["SOLYD_SWARM_INTERFACES"] == "127.0.0.1"

def test_ends_soon():
    threading.Timer(0.2, lambda: None).start()

def test_plain_daemon():
    threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()

def test_cycle():
    class Holder: pass
    holder = Holder()
    holder.me = holder
    holder.pair = socket.socketpair()
    for each in holder.pair:
        each.close()

@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool, socket.socket():
        yield pool

@pytest.mark.parametrize("n", range(3))
def test_lazy_threads_of_a_shared_pool(pool, n):
    assert pool.submit(int).result() == 0

async def test_tasks_that_end():
    async def brief():
        await asyncio.sleep(0.05)
    task = asyncio.create_task(brief())
    cancelled = asyncio.create_task(asyncio.sleep(100))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.to_thread(int)
    test_tasks_that_end.kept = task, cancelled

@pytest.fixture
async def server():
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    yield server
    server.close()
    await server.wait_closed()

async def test_server(server):
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await reader.read()
    writer.close()
    await writer.wait_closed()

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def background():
    task = asyncio.create_task(asyncio.sleep(100))
    yield task
    task.cancel()

@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("n", range(2))
async def test_shared_loop(background, n):
    assert not background.done()

def test_seed(seed):
    assert isinstance(seed, int)
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    conftest = Path(__file__).with_name("conftest.py").read_text()
    assert "PATIENCE = 1.0" in conftest
    pytester.makeconftest(conftest.replace("PATIENCE = 1.0", "PATIENCE = 0.4"))
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n")
    return pytester


def test_leaks_are_errors_of_the_test_that_leaks(project: pytest.Pytester) -> None:
    project.makepyfile(LEAKS)
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "-rE")
    names = [
        "thread",
        "daemon_of_ours",
        "socket",
        "loop",
        "task",
        "server",
        "fixture_task",
        "after",
    ]  # the last test ends the shared fixture
    result.assert_outcomes(passed=10, errors=len(names))
    text = result.stdout.str()
    for name in names:
        assert f"ERROR at teardown of test_{name} " in text
    for trace in ("careless", "solyd_swarm loop", "endless", "from a fixture", "socket:["):
        assert trace in text


def test_no_false_alarm(project: pytest.Pytester) -> None:
    project.makepyfile(CLEAN)
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=12)


def test_a_failure_tells_its_seed(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLYD_TEST_SEED", "4711")
    project.makepyfile("def test_it(seed):\n    assert seed == 1\n")
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["*SOLYD_TEST_SEED=4711 repeats this*"])
