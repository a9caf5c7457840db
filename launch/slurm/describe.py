"""What the scripts of this folder need to know of a run, one a line: its directory, and where its machines meet.

python launch/slurm/describe.py CONFIG [key.sub=value ...]

A mistake in the configuration is thus reported once, before any rank starts.
"""

from __future__ import annotations

import os
import sys

from partialfc.config import load_config
from partialfc.distributed.ranks import reachable, slurm_address, slurm_port
from partialfc.supervision.exit_codes import EXIT_OK, EXIT_USER_ERROR


def main(arguments: list[str]) -> int:
    """Prints the lines; returns the exit code."""
    try:
        directory = load_config(arguments[0], arguments[1:]).run.directory
        address = os.environ.get("MASTER_ADDR") or reachable(slurm_address(os.environ))
        port = os.environ.get("MASTER_PORT") or str(slurm_port(os.environ))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"partialfc: error: {error}\n")
        return EXIT_USER_ERROR
    sys.stdout.write(f"{directory}\n{address}\n{port}\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
