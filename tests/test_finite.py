"""Infinite values and NaN are found in tensors of every type."""

import pytest
import torch

from lowmem_db.finite import first_not_finite, is_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_value_is_enough(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.ones(1000)
    assert is_finite(tensor.to(dtype))
    tensor[place] = value
    if dtype == torch.float8_e4m3fn and value != value:
        assert not is_finite(tensor.to(dtype))
    elif dtype != torch.float8_e4m3fn:  # which has no infinity
        assert not is_finite(tensor.to(dtype).reshape(10, 100).T)


def test_what_cannot_be_infinite_is_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.empty(3, device="meta"))


def test_first_name_is_told() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert first_not_finite({"a": torch.ones(2), "b": bad, "c": bad}) == "b"
    assert first_not_finite({"a": torch.ones(2)}) is None
