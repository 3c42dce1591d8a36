"""An application of several programs that receive each other's events through silbo. See README.md; `make demo` runs it."""
