"""``python -m stanch.cli``: the same as the command ``stanch``."""

from __future__ import annotations

import sys

from stanch.cli import main

if __name__ == "__main__":
    sys.exit(main())
