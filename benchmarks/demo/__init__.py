"""The picture that `make demo` ends with."""
