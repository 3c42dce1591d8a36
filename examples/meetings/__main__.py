"""`python -m examples.meetings`, which is what `make demo` runs."""

import sys


def main() -> int | str:
    """Only what is needed to meet a Ctrl-C is imported before this."""
    try:
        from examples.meetings import demo

        return demo.main()
    except ModuleNotFoundError as error:
        return f"{error}. `make demo` installs what the demo needs"
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
