"""Code that a host loads and does not know: what it states, how it is found, and in which order it is loaded."""
