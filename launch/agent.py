"""The agent of torchrun on one machine, with exit codes that say how the run has ended. For launch/torchrun.sh.

python launch/agent.py [options of torchrun] launch/rank.py train CONFIG [key.sub=value ...]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from partialfc.supervision.exit_codes import EXIT_OK, EXIT_RETRY, EXIT_STOPPED, EXIT_USER_ERROR

FINAL = "PARTIALFC_FINAL"  # the environment variable with a file that a rank makes to say: no use starting again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    """Runs torchrun in this process; returns the exit code."""
    for number in _SIGNALS:  # until workers run: torchrun then has handlers that hand them on
        signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    def stop(number: int, frame: FrameType | None) -> None:
        # Torchrun takes this kind for a machine that leaves, and lets the others meet without it.
        # It hands the same signal on, and ranks save at SIGTERM.
        handed_on = signal.SIGTERM if number in (signal.SIGHUP, signal.SIGQUIT) else signal.Signals(number)
        raise SignalException("told to stop", sigval=handed_on)

    for number in _SIGNALS:
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="partialfc-") as directory:
        final = Path(directory) / "final"
        os.environ[FINAL] = str(final)
        try:
            torchrun(arguments)
        except SignalException as told:
            _say(f"told to stop by {told.sigval.name}; start again to go on")
            return EXIT_STOPPED
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
            _say(f"{failed}\nfailed in spite of all restarts; start again to try from the last checkpoint")
            return code if code > 0 else EXIT_RETRY
        except RendezvousError as error:
            _say(f"the machines did not meet: {type(error).__name__}: {error}")
            return EXIT_RETRY
        return EXIT_USER_ERROR if final.exists() else EXIT_OK


def _say(message: str) -> None:
    sys.stderr.write(f"launch/torchrun.sh: {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
