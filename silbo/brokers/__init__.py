"""Adapters to what carries messages: one module or folder each, none of which imports another."""
