"""One rank under launch/agent.py: `partialfc`, except that torchrun does not start it again after a user's mistake.

To torchrun every exit code but 0 is a reason to end all ranks and to start them again. A mistyped configuration would
be reported once for each restart. So such a rank leaves a mark, and when started again, ranks end as if all were well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from agent import FINAL

from partialfc.cli import main as partialfc
from partialfc.supervision.exit_codes import EXIT_OK, EXIT_USER_ERROR, leave


def main(arguments: list[str]) -> NoReturn:
    """Runs one command of `partialfc`, and ends with its exit code."""
    final = Path(os.environ[FINAL])

    def end(code: int) -> NoReturn:
        if code == EXIT_USER_ERROR:
            final.touch()
        leave(code)

    if final.exists():
        leave(EXIT_OK)
    try:
        partialfc(arguments, at_end=end)
    except SystemExit as exit_:  # of argparse, or of a process on its own that ends
        end(exit_.code if isinstance(exit_.code, int) else EXIT_USER_ERROR)
    raise AssertionError("a command that has neither ended nor failed")


if __name__ == "__main__":
    main(sys.argv[1:])
