"""The entry point of ``silbo`` and ``python -m silbo``: see :mod:`silbo.cli`."""

import sys

from silbo.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
