"""The checks of this folder can fail."""

import pytest
import torch
from kernel_contract import assert_independent_of_order, guarded
from lowmem_db_kernels._triton import INTERPRETED, jit, tl


@jit
def last_program_kernel(result_ptr):
    tl.store(result_ptr, tl.program_id(0))


@jit
def behind_the_end_kernel(result_ptr, size):
    tl.store(result_ptr + size, 1)


@pytest.mark.skipif(not INTERPRETED, reason="programs of a card run in any order")
def test_a_result_that_depends_on_the_order_of_programs_is_noticed(device):
    def run():
        result = torch.zeros(1, dtype=torch.int32, device=device)
        last_program_kernel[(5,)](result)
        return {"result": result}

    with pytest.raises(AssertionError, match="result with the grid reversed differs"):
        assert_independent_of_order(run)


def test_a_write_behind_the_end_is_noticed(device):
    with pytest.raises(AssertionError, match="written behind a buffer"), guarded() as guard:
        behind_the_end_kernel[(1,)](guard(torch.zeros(10, dtype=torch.uint8, device=device)), 10)
