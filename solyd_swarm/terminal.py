"""The terminal's settings, to be put back when the process ends without readline being asked.

``input()`` with readline switches echo off while it waits; a process that ends meanwhile would leave the shell like that.
"""

import contextlib
import os
import sys
from typing import Any

_remembered: tuple[int, list[Any]] | None = None


def remember() -> None:
    """Keep the settings of the terminal on standard input, if it is one."""
    global _remembered
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import termios

        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor):
            with contextlib.suppress(termios.error):
                _remembered = descriptor, termios.tcgetattr(descriptor)


def restore() -> None:
    """Put back what was remembered, where it has changed and the terminal is ours (in the background, trying would stop us)."""
    if _remembered is None:
        return
    import termios

    descriptor, settings = _remembered
    with contextlib.suppress(OSError, termios.error):
        if os.tcgetpgrp(descriptor) == os.getpgrp() and termios.tcgetattr(descriptor) != settings:
            termios.tcsetattr(descriptor, termios.TCSANOW, settings)
