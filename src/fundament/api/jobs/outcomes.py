"""What becomes of the lines of a batch job: embedded many at a time, written to its output and its errors."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any

from fundament.api.answers import EmbeddingsAnswer, contents, divided
from fundament.api.embeddings import EmbeddingsRequest, embed
from fundament.api.errors import openai_form
from fundament.api.jobs.lines import Line
from fundament.api.state import State
from fundament.api.wire import json_bytes
from fundament.core import Bill, Priority
from fundament.errors import FundamentError, LimitError, UnavailableError
from fundament.telemetry import say


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a line: its answer, or why it has none."""

    line: Line
    answer: EmbeddingsAnswer | FundamentError

    @property
    def n_tokens(self) -> int:
        """What it costs; nothing where it failed."""
        return self.answer.made.n_tokens if isinstance(self.answer, EmbeddingsAnswer) else 0


def deadly(line: Line) -> Outcome:
    """What becomes of a line over which workers died."""
    reason = "The process that ran this line died, again and again."
    return Outcome(line, line.request if isinstance(line.request, FundamentError) else FundamentError(reason))


async def embed_lines(state: State, lines: Sequence[Line], *, caller: str, bill: Bill | None = None) -> list[Outcome]:
    """Embed the lines of a chunk in the background lane, in their order; a line that cannot be fails alone.

    Raises:
        UnavailableError: the model cannot answer now.
        LimitError: the caller's minute has no room for them.
    """
    found: list[Outcome] = []
    run = partial(embed, state, priority=Priority.BACKGROUND, caller=caller, bill=bill)
    for _, alike in groupby(lines, key=lambda line: line.options or line.number):
        found += await _together(run, list(alike))
    return found


async def _together(
    run: Callable[[EmbeddingsRequest], Awaitable[EmbeddingsAnswer]], lines: list[Line]
) -> list[Outcome]:
    """Lines with equal options; halves of them where one fails."""
    requests = [line.request for line in lines if isinstance(line.request, EmbeddingsRequest)]
    if len(requests) < len(lines):
        # Those that could not be read have no options and stand alone.
        return [Outcome(line, line.request) for line in lines if isinstance(line.request, FundamentError)]
    joint = requests[0]
    if len(lines) > 1:
        joint = joint.model_copy(update={"input": [value for request in requests for value in request.input]})
    try:
        answer = await run(joint)
    except (UnavailableError, LimitError):
        raise
    except FundamentError as error:
        if len(lines) == 1:
            return [Outcome(lines[0], error)]
    except Exception as error:
        say("unexpected error", level=logging.ERROR, error=error, lines=len(lines))
        if len(lines) == 1:
            return [Outcome(lines[0], FundamentError("An unexpected error occurred."))]
    else:
        if len(lines) == 1:
            return [Outcome(lines[0], answer)]
        if answer.made.n_tokens_each:
            answers = divided(answer, [len(request.input) for request in requests])
            return [Outcome(line, each) for line, each in zip(lines, answers, strict=True)]
    middle = len(lines) // 2
    return [*await _together(run, lines[:middle]), *await _together(run, lines[middle:])]


def affordable(found: Sequence[Outcome], n_tokens: int) -> list[Outcome]:
    """The longest beginning of lines that costs no more than so many tokens."""
    costs = accumulate(each.n_tokens for each in found)
    return [each for each, cost in zip(found, costs, strict=True) if cost <= n_tokens]


def output_lines(found: Iterable[Outcome]) -> Iterator[bytes]:
    """The output's lines: of every line that has an answer, in OpenAI's form."""
    for each in found:
        if isinstance(each.answer, EmbeddingsAnswer):
            yield _written(each.line, 200, contents(each.answer), None)


def error_lines(found: Iterable[Outcome]) -> Iterator[bytes]:
    """The errors' lines: of every line that has none, with the reason."""
    for each in found:
        if isinstance(error := each.answer, FundamentError):
            code = error.code or "invalid_input"
            body = {"error": openai_form(error) | {"code": code}}
            yield _written(each.line, error.status, body, {"code": code, "message": error.detail})


def _written(line: Line, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
    name = f"batch_req_{line.number}"
    return (
        json_bytes(
            {
                "id": name,
                "custom_id": line.custom_id,
                "response": {"status_code": status, "request_id": name, "body": body},
                "error": error,
            }
        )
        + b"\n"
    )
