"""The command line: one file per command, which parses, calls and prints; the exit codes. No logic."""
