"""The command line: reads arguments, calls the functions of an outbox or of the dead letters, and prints.

Exit codes: 0 it is done; 1 it failed, or was not done; 2 the command is wrong; 130 it was interrupted.

``--json`` prints one JSON object on a line, a list as one for each item; it and ``silbo relay`` need no extra. The tables
for people need ``silbo[cli]``.
"""
