"""The command line: a module for each command; :mod:`silbo.cli.main` has their list.

Exit codes: 0 it is done; 1 it failed, or was not done; 2 the command is wrong; 130 it was interrupted.

``--json`` prints each JSON object on a line of its own; ``--json``, ``silbo consume``, ``silbo relay`` and ``silbo page`` need no extra. The tables for people
need ``silbo[cli]``.
"""
