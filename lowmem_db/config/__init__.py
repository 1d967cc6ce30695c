"""The configuration: a frozen tree, its loading, and the table of refused combinations."""
