"""An application of several programs that hear each other through silbo. See README.md; `make demo` runs them all."""
