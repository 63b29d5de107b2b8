"""Errors that cost the device, and errors that a smaller batch may not meet."""

import pytest
import torch

from fundament.engine.failures import device_lost, out_of_memory
from tests.engine.device_errors import device_error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (device_error(700), True),  # an illegal address
        (device_error(710), True),  # an assertion in a kernel
        (device_error(719), True),  # a kernel that failed
        (device_error(2), False),  # no memory
        (device_error(9), False),  # a launch of a wrong shape
        (torch.AcceleratorError("without a code"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_what_costs_the_device_is_told_from_what_fails_one_pass(error: BaseException, lost: bool) -> None:
    assert device_lost(error) is lost


@pytest.mark.parametrize(
    ("error", "likely"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (ValueError("out of range"), False),
    ],
)
def test_what_a_smaller_batch_may_not_meet(error: BaseException, likely: bool) -> None:
    assert out_of_memory(error) is likely
