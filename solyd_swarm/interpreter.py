"""What CPython tells about how it runs and how the main thread ended, for `solyd_swarm.lifetime`."""

import opcode
import os
import sys
import threading
from types import FrameType


def interactive() -> bool:
    """Whether somebody types at this Python: a REPL (also after ``python -i script``), IPython, a notebook's kernel."""
    if hasattr(sys, "ps1") or sys.flags.interactive or sys.flags.inspect or os.environ.get("PYTHONINSPECT"):
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython, "get_ipython", lambda: None)() is not None


def is_main() -> bool:
    """Whether this is the main interpreter of the process, not a subinterpreter."""
    import _thread

    if hasattr(_thread, "_is_main_interpreter"):  # since 3.12
        return bool(_thread._is_main_interpreter())
    try:
        import _xxsubinterpreters as interpreters  # type: ignore[import-not-found]
    except ImportError:
        return True
    return bool(interpreters.get_current() == interpreters.get_main())


def script_frame() -> FrameType | None:
    """The frame whose end is the end of the script: that of the ``__main__`` module, or whatever is outermost.

    They differ under ``coverage run`` and the like, which run a script from inside another one. None in a subinterpreter.
    """
    if not is_main():
        return None
    if threading.current_thread() is threading.main_thread():
        frame: FrameType | None = sys._getframe()
    else:
        # Only where it must be: it goes through the frames of all interpreters, and 3.13 crashes when that is done in another one.
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
    outermost = module = None
    main = getattr(sys.modules.get("__main__"), "__dict__", None)
    while frame is not None:
        outermost = frame
        if frame.f_globals is main and frame.f_code.co_name == "<module>":
            module = frame
        frame = frame.f_back
    return module or outermost


def ran_off_its_end(frame: FrameType | None) -> bool:
    """Whether the frame has returned. An exception, ``SystemExit`` too, leaves it at some other instruction."""
    if frame is None or frame.f_lasti < 0:
        return False
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]] in ("RETURN_VALUE", "RETURN_CONST")


def was_interrupted(frame: FrameType | None) -> bool:
    """Whether the script with that frame ended by a ``KeyboardInterrupt`` that nobody caught."""
    uncaught = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return isinstance(uncaught, KeyboardInterrupt) and not interactive() and not ran_off_its_end(frame)
