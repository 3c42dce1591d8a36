"""Programs to read, to run and to copy from; `make demo` runs the largest."""
