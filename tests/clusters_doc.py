"""The commands of docs/clusters.md, so that what tests run is what the page says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "clusters.md"


def documented(name: str, replacements: dict[str, str]) -> str:
    """A command of the page, with what is too large or too far away for a test replaced; each of that must be in it."""
    (command,) = re.findall(rf"<!-- command: {re.escape(name)} -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for old, new in replacements.items():
        assert old in command, f"{old!r} is not in the command {name} of {PAGE.name}: {command}"
        command = command.replace(old, new)
    return command
