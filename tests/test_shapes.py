"""Shapes that a signature states are checked in the tests."""

import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from lowmem_db.objective.process import Diffusion
from tests import WITH_SHAPES


def test_a_wrong_shape_is_noticed() -> None:
    with pytest.raises(TypeCheckError):
        Diffusion(torch.ones(3, 3), "epsilon")


def test_modules_were_not_imported_before_they_could_be_checked() -> None:
    assert len(WITH_SHAPES) >= 20
    imported = [sys.modules[name] for name in WITH_SHAPES if name in sys.modules]
    assert imported
    assert all("jaxtyping" in type(module.__spec__.loader).__module__ for module in imported if module.__spec__)
