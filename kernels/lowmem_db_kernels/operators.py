"""torch operators whose operands are declared once, as the fields of a NamedTuple that every twin takes.

torch's wrapper of a custom operator takes several times as long as a small launch. If `runs_plainly` says that nothing
observes operators, a caller may pass the operands directly to the implementation.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch._C._functorch import peek_interpreter_stack

from ._ops import add_op_namespace_prefix


def custom_op(
    name: str, serve: Callable[[Any], Any], operands: type, returns: Any, *, mutates: Iterable[str] = ()
) -> Any:
    """Register an operator whose flat schema is made from the fields of a NamedTuple.

    Args:
        name: The operator's own name.
        serve: The implementation; takes the operands as one NamedTuple.
        operands: The NamedTuple; its fields must have types that torch's schemas support.
        returns: The return type of `serve`.
        mutates: Fields that are written in place.

    Returns:
        The operator of `torch.library.custom_op`, to be called with the fields one after another.
    """
    fields, defaults = get_type_hints(operands), operands._field_defaults  # type: ignore[attr-defined]
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(field, kind, annotation=fields[field], default=defaults.get(field, none))
        for field in operands._fields  # type: ignore[attr-defined]
    ]

    def flat(*values: Any) -> Any:
        return serve(operands(*values))

    flat.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.custom_op(add_op_namespace_prefix(name), flat, mutates_args=tuple(mutates))


def runs_plainly(tensor: torch.Tensor) -> bool:
    """Return whether a call may bypass the dispatcher, because nothing traces, compiles, fakes or counts operators.

    Args:
        tensor: The operand that decides.

    Returns:
        False under torch.compile, a dispatch mode or a transform of torch.func, and for subclasses and meta tensors.
    """
    if torch.compiler.is_compiling():  # first, because torch.compile does not support the lines below
        return False
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
    )
