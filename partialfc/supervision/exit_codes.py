"""What a process says by the way it ends, to torchrun, Slurm and the scripts around them."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
from contextlib import suppress
from typing import NoReturn

from partialfc.distributed.ranks import launched

__all__ = ["EXIT_BUG", "EXIT_OK", "EXIT_RETRY", "EXIT_STOPPED", "EXIT_USER_ERROR", "leave", "leave_at_once", "say"]

EXIT_OK = 0
EXIT_BUG = 1  # A fault of the program, with a traceback.
EXIT_USER_ERROR = 2  # A start with the same configuration and data would end the same way.
EXIT_RETRY = 75  # A rank hangs, died, or cannot be reached: start again. (EX_TEMPFAIL of sysexits.h)
EXIT_STOPPED = 85  # Told to stop: start again to go on.

_STANDARD_ERROR = 2


def say(message: str, *, stacks: bool = False) -> None:
    """Writes one line to standard error from any thread, whatever the others are in.

    Args:
        message: the line.
        stacks: whether the stacks of all threads follow.
    """
    place = ""
    with suppress(ValueError):
        if (process := launched(os.environ)).launcher != "none":
            place = f" (rank {process.rank})"
    # Not by print: the thread that holds the lock of the stream may be the one that hangs.
    os.write(_STANDARD_ERROR, f"partialfc{place}: {message}\n".encode())
    if stacks:
        faulthandler.dump_traceback(file=_STANDARD_ERROR, all_threads=True)


def leave(code: int) -> NoReturn:
    """The end of a program: as `sys.exit`, except that a rank of several does not take its interpreter down.

    Gloo may still be giving a tensor back in a thread of its own, which would abort the process then.
    """
    several = False
    with suppress(ValueError):
        several = launched(os.environ).world_size > 1
    if not several:
        sys.exit(code)
    _kill_children()  # multiprocessing would wait for them without end
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # whoever read it is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_at_once(code: int) -> NoReturn:
    """Ends this process from any thread, and with it its children of multiprocessing."""
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
