"""The configuration: a frozen tree, how it is read, and the table of refused combinations."""
