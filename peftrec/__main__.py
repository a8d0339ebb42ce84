"""`python -m peftrec` is the `peftrec` command."""

from __future__ import annotations

import sys

from peftrec.cli import main

if __name__ == "__main__":
    sys.exit(main())
