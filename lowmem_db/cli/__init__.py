"""The command line and its exit codes: one file per command that parses, calls and prints. No logic."""
