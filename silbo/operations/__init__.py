"""Answers about a running system, as functions with typed results. The command line only shows them.

One module for each question; :mod:`silbo.cli` has a command for each, with a table for people and ``--json`` for programs.
"""
