"""``lowmem-db identifiers``."""


def identifiers() -> None:
    """Print rare identifiers."""
