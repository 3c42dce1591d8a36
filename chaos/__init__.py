"""The proof: real programs, real faults, and ledgers that say what must be there afterwards. `python -m chaos --help`."""
