"""Ids that callers send: what has not the form of one is nobody's, and no database is asked for it."""

import re
from collections.abc import Callable

from fundament.errors import NotFoundError

FORM = "^[A-Za-z0-9_-]{1,100}$"
"""Of every id that is given here, and of the words in queries; PostgreSQL fails at a NUL."""


def checked_id(text: str, refusal: Callable[[str], NotFoundError]) -> str:
    """An id as databases take it.

    Args:
        text: what a caller sent.
        refusal: what is said of an id that is nobody's.

    Raises:
        NotFoundError: nothing has an id of that form.
    """
    if re.fullmatch(FORM, text) is None:
        raise refusal(text)
    return text
