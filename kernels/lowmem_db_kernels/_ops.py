"""The namespace of the package's torch operators.

The Kernel Hub's builder replaces this file with one that has a namespace per build, so every operator is named here.
"""

NAMESPACE = "lowmem_db_kernels"


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an operator.

    Args:
        name: The operator's own name.

    Returns:
        `namespace::name`.
    """
    return f"{NAMESPACE}::{name}"
