"""What the make targets, the tests, the demo and the benchmarks need; never part of the wheel."""
