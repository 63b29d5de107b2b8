"""bge-m3 as it is published: XLM-RoBERTa in PyTorch's own format, and two heads beside it."""

from pathlib import Path

import torch

from tests.checkpoints import random_tensors
from tests.checkpoints.xlm_roberta import HIDDEN, xlm_roberta


def bge_m3(directory: Path) -> Path:
    """A tiny one."""
    xlm_roberta(directory, pickled=True)
    for name, n_out in (("sparse_linear.pt", 1), ("colbert_linear.pt", HIDDEN)):
        shapes = {"weight": (n_out, HIDDEN), "bias": (n_out,)}
        torch.save(random_tensors(shapes, seed=n_out), directory / name)
    return directory
