"""Every error a caller can meet, raised anywhere below and rendered once in `fundament.api.errors`."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


class FundamentError(Exception):
    """An error with an HTTP status, a code of the API's table and a sentence for the caller."""

    status = 500
    code: str | None = "INTERNAL_ERROR"
    retry_after_seconds: int | None = None
    is_final: bool = False  # a client need not try again by itself: the request, or the server, has to change

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


_LONGEST_WORD = 100  # callers say words, and looking takes time


def near(word: str, known: Iterable[str]) -> str:
    """A sentence that asks whether a known word was meant; nothing where none is like it, or the word is long."""
    found = get_close_matches(word, known, n=1) if len(word) <= _LONGEST_WORD else []
    return f" Did you mean {found[0]}?" if found else ""


def why(error: OSError) -> str:
    """What went wrong, in the system's words where it has any; others' may be many lines."""
    return os.strerror(error.errno).lower() if error.errno else str(error).partition("\n")[0]


def install(extra: str) -> str:
    """The command that brings an optional package into this environment."""
    return f"{sys.executable} -m pip install 'fundament[{extra}]'"


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong field of a request: its path (`body -> input -> 3`), what is wrong, a short type, the value sent."""

    field: str
    message: str
    type: str = "value_error"
    input: Any = None


class InputError(FundamentError):
    """A request that says something which cannot be served. Each fault names its field."""

    status = 422
    code = None

    def __init__(self, *faults: Fault) -> None:
        first = faults[0]
        super().__init__(f"{first.field.removeprefix('body -> ')}: {first.message}")
        self.faults: Sequence[Fault] = faults


class TooLongError(FundamentError):
    """An input longer than the model's context, without `truncate`.

    Args:
        name: what is too long, where it is not called an input.
        index: its place among the inputs.
        n_tokens: of the whole of it.
        limit: most tokens of it that the model reads.
        more: whether it has more than those, and nobody has counted how many.
    """

    status = 400
    code = "INPUT_TOKEN_LIMIT_EXCEEDED"

    def __init__(
        self, name: str | None = None, *, index: int = 0, n_tokens: int, limit: int, more: bool = False
    ) -> None:
        super().__init__(
            f"{name or f'Input {index}'} has {'more than ' * more}{n_tokens} tokens and exceeds the model's maximum of "
            f"{limit} tokens. Use 'truncate: true' to cut it automatically, or split it into smaller chunks."
        )
        self.index, self.n_tokens, self.limit, self.more = index, n_tokens, limit, more


class TooLongTogetherError(FundamentError):
    """Inputs read as one that are longer than the model's context; with `truncate`, some have nothing left to pool.

    Args:
        n_tokens: of all inputs together.
        limit: the model's context.
        more: whether they have more than those, and nobody has counted how many.
        lost: the first input that lies wholly behind the cut; None where nothing may be cut.
    """

    status = 400
    code = "INPUT_TOKEN_LIMIT_EXCEEDED"

    def __init__(self, *, n_tokens: int, limit: int, more: bool, lost: int | None) -> None:
        cut = "Use 'truncate: true' to cut the end, 'late_chunking_window'"
        if lost is not None:
            cut = f"Cut there, nothing is left of input {lost}. Use 'late_chunking_window'"
        super().__init__(
            f"With late_chunking the inputs have {'more than ' * more}{n_tokens} tokens together and exceed the "
            f"model's maximum of {limit} tokens. {cut} to read them in windows that overlap, or send less at once."
        )


class ConversationTooLongError(FundamentError):
    """A conversation that leaves no room for its answer.

    Args:
        n_tokens: of the conversation, or of what was counted when there were too many.
        n_wanted: tokens that the answer should have room for.
        limit: tokens of both together.
    """

    status = 400
    code = "INPUT_TOKEN_LIMIT_EXCEEDED"

    def __init__(self, *, n_tokens: int, n_wanted: int, limit: int) -> None:
        super().__init__(
            f"The conversation has {n_tokens} tokens and its answer should have room for {n_wanted}: together at most "
            f"{limit} fit. Leave out older messages or images, or ask for fewer 'max_tokens'."
        )


class BodyError(FundamentError):
    """A body that cannot be read: its status tells why.

    400: broken off; 413: too large; 415: of another type; 499: its client has gone.
    """

    code = None

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class ModelNotFoundError(FundamentError):
    """A model that this server does not serve; the sentence lists what it does, or how to get the weights."""

    status = 400
    code = "INPUT_MODEL_NOT_FOUND"


class InvalidLabelsError(FundamentError):
    """Labels that nothing can be learned from, or that cannot be kept."""

    status = 400
    code = "INPUT_INVALID_LABELS"


class LabelLimitError(FundamentError):
    """More labels than one request or one classifier may have."""

    status = 400
    code = "INPUT_LABEL_LIMIT_EXCEEDED"


class ResourceLimitError(FundamentError):
    """A caller has as much of something as one caller may have."""

    status = 403
    code = "AUTHZ_RESOURCE_LIMIT_EXCEEDED"


class BusyError(FundamentError):
    """A resource that is being changed, or, where it `is_final`, cannot be any more."""

    status = 409
    code = "CONFLICT_RESOURCE_BUSY"

    def __init__(self, detail: str, *, is_final: bool = False) -> None:
        super().__init__(detail)
        self.is_final = is_final


class NotFoundError(FundamentError):
    """A resource that is not there, or is somebody else's."""

    status = 404
    code = "RESOURCE_NOT_FOUND"


class AuthError(FundamentError):
    """A request without a key that works; `code` tells why."""

    status = 401

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class BalanceError(FundamentError):
    """A key whose tokens are spent."""

    status = 403
    code = "AUTHZ_INSUFFICIENT_BALANCE"


class NotAllowedError(FundamentError):
    """A key that works, but not for this."""

    status = 403
    code = "AUTHZ_ADMIN_REQUIRED"


class LimitError(FundamentError):
    """More than a caller may do now; it says when to try again."""

    status = 429

    def __init__(self, code: str, detail: str, *, retry_after_seconds: int, is_final: bool = False) -> None:
        super().__init__(detail)
        self.code, self.retry_after_seconds, self.is_final = code, retry_after_seconds, is_final


class FetchError(FundamentError):
    """A URL of the caller's that cannot or may not be read.

    Args:
        reason: one word: `form`, `scheme`, `address`, `unreachable`, `redirects`, `status`, `size`, `time`, `broken`.
        detail: the sentence for the caller. It is the same for an address that is not allowed and one where nothing
            answers, so that nobody can feel out a private network by it.
    """

    status = 422
    code = None

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    @classmethod
    def unreachable(cls, reason: str) -> "FetchError":
        """An address that is not allowed, or where nothing answers."""
        return cls(reason, "The URL cannot be reached from here: its address is not public, or nothing answers there.")


class UnavailableError(FundamentError):
    """The server cannot take this request now; it says when to try again."""

    status = 503
    code = "SERVICE_UNAVAILABLE"

    def __init__(self, detail: str, *, retry_after_seconds: int = 1, is_final: bool = False) -> None:
        super().__init__(detail)
        self.retry_after_seconds, self.is_final = retry_after_seconds, is_final


class TimedOutError(FundamentError):
    """A request that took longer than the operator lets one take.

    Args:
        seconds: how long that is.
    """

    status = 504
    code = "SERVICE_TIMEOUT"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Request timed out after {seconds:g} seconds. Send fewer inputs at once, or try again later.")


class RowError(FundamentError):
    """A row whose forward pass fails though it runs alone, or whose result is not finite in float32 either."""


class CheckpointError(FundamentError):
    """A checkpoint that does not load: a missing file, a name not consumed, a parameter not filled; callers get 503."""
