"""Instrumentation: traces and metrics of a running program, each by a library that is an extra."""
