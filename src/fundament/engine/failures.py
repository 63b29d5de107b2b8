"""What an error that a forward pass raised says of the device."""

_LOST = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})
"""CUDA's errors (`cudaError_t`) that leave a process nothing to ask of its device: memory that cannot be corrected,
addresses and instructions that are not valid, kernels that time out, assert or fail."""


def device_lost(error: BaseException) -> bool:
    """Whether every later pass on the device would fail too, until the process is started anew.

    PyTorch puts the runtime's code on its `AcceleratorError`.
    """
    return getattr(error, "error_code", None) in _LOST


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could succeed."""
    words = str(error).lower()
    told = ("out of memory", "can't allocate memory", "status_alloc_failed")  # CUDA's allocator, the CPU's, cuBLAS
    return isinstance(error, MemoryError) or any(each in words for each in told)
