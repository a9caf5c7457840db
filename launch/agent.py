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
from partialfc.supervision.signals import AGENT

FINAL = "PARTIALFC_FINAL"  # the environment variable with a file that a rank makes to say: no use starting again
# What tells this machine to stop, and what ranks are then told, which save at three signals only.
_SIGNALS = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
_SIGNALS |= dict.fromkeys((signal.SIGHUP, signal.SIGQUIT), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Runs torchrun in this process; returns the exit code."""
    signals = dict(_SIGNALS)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup leaves it, to go on when the session ends
        del signals[signal.SIGHUP]
    for number in signals:
        signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    def stop(number: int, frame: FrameType | None) -> None:
        # Torchrun takes this kind for a machine that leaves, and lets the others meet without it.
        raise SignalException("told to stop", sigval=signals[signal.Signals(number)])

    for number in signals:
        signal.signal(number, stop)
    # For those that are handed on as they are, torchrun puts its own handlers in the place of ours when workers start.
    own = ",".join(number.name for number, handed_on in signals.items() if number == handed_on)
    with tempfile.TemporaryDirectory(prefix="partialfc-") as directory:
        final = Path(directory) / "final"
        os.environ[FINAL] = str(final)
        os.environ[AGENT] = str(os.getpid())
        try:
            torchrun(["--signals-to-handle", own, *arguments])
        except SignalException as told:
            _say(f"told to stop by {told.sigval.name}; start again to go on")
            return EXIT_STOPPED
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
            _say(f"{failed}\nfailed in spite of all restarts; start again to try from the last checkpoint")
            return code if code > 0 else EXIT_RETRY
        except RendezvousError as error:
            why = str(error) or "not all have come within JOIN_SECONDS"
            _say(f"the machines did not meet: {type(error).__name__}: {why}")
            return EXIT_RETRY
        return EXIT_USER_ERROR if final.exists() else EXIT_OK


def _say(message: str) -> None:
    sys.stderr.write(f"launch/torchrun.sh: {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
