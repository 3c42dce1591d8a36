"""Dependency-injection containers: one module for each, imported by who uses it."""
