"""Tests to run on adapters of your own: a suite for publishers."""
