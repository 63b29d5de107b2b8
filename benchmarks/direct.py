"""The engine called directly, without HTTP, and sentence-transformers beside it."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import uvloop
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

import corpus
from contest import n_cores
from fundament.backbone.device import Dtype
from fundament.core import Array, Embed, Item, Model, Priority
from fundament.engine.batcher import Batcher, Ticket
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.telemetry import Metrics

# As the server does: text is tokenized on the engine's own threads.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
logging.disable_progress_bar()

T = TypeVar("T")


def event_loop() -> asyncio.Runner:
    """An event loop of the kind that the server runs on."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


class DirectEngine:
    """The engine with the embedded model, called from ordinary code.

    Args:
        dtype: number format of the weights.
    """

    def __init__(self, dtype: Dtype = "auto") -> None:
        self.model = corpus.model().spec.id
        self.engine = LocalEngine({self.model: corpus.model()}, EngineOptions(dtype=dtype), Metrics())
        self.runner = event_loop()
        self.runner.run(self.engine.load(self.model))

    async def run(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors as the model gives them, `[texts, dim]`."""
        return (await self.engine.run(self.model, Embed(inputs=texts))).vectors

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same, from ordinary code."""
        return self.runner.run(self.run(texts))

    def close(self) -> None:
        """End its threads."""
        self.runner.run(self.engine.close())
        self.runner.close()


class Reference:
    """sentence-transformers with the same weights, on all cores, with its own defaults."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = SentenceTransformer(str(corpus.model().directory), device="cpu").to(dtype)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, `[texts, dim]`."""
        # PyTorch counts threads per calling thread, and one that never asked takes over what the engine's threads set.
        torch.set_num_threads(n_cores())
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            return self.model.encode(list(texts), show_progress_bar=False)
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


def batcher_of(model: Model, *, n_threads: int, max_batch_tokens: int = 2_048) -> Batcher:
    """A model's threads, so many that run side by side, with the cores divided among them."""
    return Batcher(
        f"{n_threads} by side",
        model,
        n_threads=n_threads,
        n_cores=n_cores(),
        computing=set(),
        deaths={},
        max_batch_tokens=max_batch_tokens,
        few_tokens=0,
        max_waiting_rows=1_000_000,
        max_waiting_bytes=10**12,
        rescue=None,
        metrics=Metrics(),
    )


async def through(
    batcher: Batcher, items: Sequence[Item], priority: Priority = Priority.INTERACTIVE
) -> tuple[list[Array], float]:
    """Rows through a model, and the seconds that it took."""
    loop = asyncio.get_running_loop()
    ticket = Ticket(loop, loop.create_future())
    ticket.open(items)
    started = time.perf_counter()
    batcher.submit(ticket, items, priority)
    return await ticket.done, time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Effort:
    """What something took: seconds on the clock, and seconds of all cores together."""

    seconds: float
    core_seconds: float


def effort(work: Callable[[], object]) -> Effort:
    """What `work` takes in this process."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return Effort(time.perf_counter() - started, time.process_time() - used)
