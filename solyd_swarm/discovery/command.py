"""What the system's own programs say, such as the one that prints the routes."""

import asyncio
import contextlib
import logging
import shutil

MAX_OUTPUT = 1024 * 1024
"""Bytes read of what a program prints. A table that is longer is none of a machine that asks here."""

log = logging.getLogger("solyd_swarm.discovery.command")


async def output_of(program: str, *arguments: str, seconds: float) -> str:
    """What a program prints; empty if there is none, it cannot be run, fails, or has not ended in time. It does not outlive the call.

    Args:
        program: name or path.
        seconds: how long it may take.
    """
    path = shutil.which(program)
    if path is None:
        log.debug("there is no %s", program)
        return ""
    try:
        process = await asyncio.create_subprocess_exec(
            path, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except (OSError, RuntimeError, NotImplementedError) as error:  # no thread can be started to wait for it; a loop without processes
        log.debug("%s cannot be run: %s", program, error)
        return ""
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        log.debug("%s did not end in time", program)
        return ""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        log.debug("%s ended with status %d", program, process.returncode)
        return ""
    return output[:MAX_OUTPUT].decode(errors="replace")
