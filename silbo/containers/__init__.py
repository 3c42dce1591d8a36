"""Adapters of dependency-injection containers: a module for each library, imported by who uses the library.

Each module has an adapter for ``AsyncEventDispatcher(container=...)``, and a function that registers the dispatcher in the
container.
"""
