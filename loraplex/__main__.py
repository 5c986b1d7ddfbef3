"""Shell. `python -m loraplex` is the command `loraplex`."""

from __future__ import annotations

import sys

from loraplex.start import cli

if __name__ == "__main__":
    sys.exit(cli())
