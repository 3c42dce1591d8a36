"""`python -m examples.meetings`; `make demo` runs it, too."""

import sys


def main() -> int | str:
    """Run the demo. Imports that take time stand here, so that an early Ctrl-C is handled."""
    try:
        from examples.meetings import demo

        return demo.main()
    except ModuleNotFoundError as error:
        return f"{error}. `make demo` installs what the demo needs"
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
