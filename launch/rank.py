"""One rank under launch/agent.py: `partialfc`, except that torchrun does not start it again after a user's mistake.

To torchrun every exit code but 0 is a reason to end all ranks and to start them again. A mistyped configuration would
be reported once for each restart. So such a rank leaves a mark, and when started again, ranks end as if all were well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agent import FINAL

from partialfc.cli import main as partialfc
from partialfc.supervision.exit_codes import EXIT_OK, EXIT_USER_ERROR, leave


def main(arguments: list[str]) -> int:
    """Runs one command of `partialfc`; returns the exit code for torchrun."""
    final = Path(os.environ[FINAL])
    if final.exists():
        return EXIT_OK
    try:
        code = partialfc(arguments)
    except SystemExit as exit_:  # argparse
        code = exit_.code if isinstance(exit_.code, int) else EXIT_USER_ERROR
    if code == EXIT_USER_ERROR:
        final.touch()
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
