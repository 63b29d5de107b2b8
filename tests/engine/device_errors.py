"""Errors as a device reports them, without one."""

import torch


def device_error(code: int) -> BaseException:
    """As PyTorch raises what a device reports."""
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    return error
