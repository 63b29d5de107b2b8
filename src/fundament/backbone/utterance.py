"""Tokens to text while they come: characters that are not whole yet wait, and so does what may be a stop."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # how a character is decoded of which bytes are missing
_MOST_WAITING = 8  # tokens whose text is not out; a character has four bytes at most


class Utterance:
    """The text of one answer.

    Args:
        decode: what token ids say.
        stop: texts before the first of which the answer ends.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        # What a token says can depend on the one before it, so a few tokens whose text is out are decoded again.
        self._before, self._read = 0, 0
        self._waits = False  # whether the last character of what was read may still become whole
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; after a stop, nothing."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(_BROKEN) and len(self._ids) - self._read < _MOST_WAITING:
            return ""
        # Of what has waited for long, the last character alone may still become whole.
        self._waits, text = text.endswith(_BROKEN), text.removesuffix(_BROKEN)
        self._before, self._read = self._read, len(self._ids)
        return self._release(text)

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._release(self._new())
        text, self._held = text + self._held, ""
        return text

    def _new(self) -> str:
        known = len(self._decode(self._ids[self._before : self._read])) - self._waits
        return self._decode(self._ids[self._before :])[known:]

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of the text with which `stop` begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
