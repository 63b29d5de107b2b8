"""What a reranker reads of a query and of documents that may be too long: their first tokens, as text again."""

from collections.abc import Sequence
from dataclasses import dataclass

from fundament.backbone.tokenizing import TextTokenizer
from fundament.core import Rerank
from fundament.errors import Fault, InputError, TooLongError


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a text.

    Attributes:
        text: the whole text, or what its first tokens say.
        n_tokens: of that, without special tokens around it.
        n_whole: of the whole text.
        more: whether it has more than those, and nobody has counted how many.
    """

    text: str
    n_tokens: int
    n_whole: int
    more: bool = False

    @property
    def truncated(self) -> bool:
        """Whether the text was longer."""
        return self.n_tokens < self.n_whole


def count_instruction(tokenizer: TextTokenizer, call: Rerank, most: int) -> int:
    """Tokens of the caller's instruction, which is never cut: it would say something else.

    Args:
        tokenizer: the model's own.
        call: what is asked.
        most: tokens that leave room for a query and documents.

    Raises:
        InputError: it is longer.
    """
    [ids] = tokenizer.pieces([call.instruction or ""])
    if len(ids) > most:
        message = f"It has {len(ids)} tokens. Beside a query and documents this model reads at most {most}: shorten it."
        raise InputError(Fault("body -> instruction", message, "too_long"))
    return len(ids)


def read_query(tokenizer: TextTokenizer, call: Rerank, most: int) -> Excerpt:
    """What is read of the query.

    Args:
        tokenizer: the model's own.
        call: what is asked; what its `max_query_tokens` cuts is not missed.
        most: tokens that the model reads.

    Raises:
        TooLongError: more is asked for than that, without `truncate`.
    """
    [query] = _cut(tokenizer, [call.texts[0]], call.max_query_tokens, most)
    _refuse_loss(call, query, "The query", call.max_query_tokens)
    return query


def read_documents(
    tokenizer: TextTokenizer, call: Rerank, most: int | None = None, *, room: int | None = None
) -> list[Excerpt]:
    """What is read of each different document, in the order in which they first come.

    Args:
        tokenizer: the model's own.
        call: what is asked; what its `max_document_tokens` cuts is not missed.
        most: tokens that the model reads; None means all.
        room: tokens of all that it reads together: more of a document is never looked at.

    Raises:
        TooLongError: more is asked for than that, without `truncate`.
    """
    asked, texts = call.max_document_tokens, call.texts[1]
    different = list(dict.fromkeys(texts))
    documents = _cut(tokenizer, different, asked, most, room)
    for text, document in zip(different, documents, strict=True):
        if document.truncated:
            _refuse_loss(call, document, f"Document {texts.index(text)}", asked)
    return documents


def _refuse_loss(call: Rerank, read: Excerpt, name: str, asked: int | None) -> None:
    wanted = read.n_whole if asked is None else min(asked, read.n_whole)
    if read.n_tokens < wanted and not call.truncate:
        raise TooLongError(name, n_tokens=wanted, limit=read.n_tokens, more=read.more and wanted == read.n_whole)


def _cut(
    tokenizer: TextTokenizer, texts: Sequence[str], asked: int | None, most: int | None, room: int | None = None
) -> list[Excerpt]:
    found, limits = [], [limit for limit in (asked, most) if limit is not None]
    bounds = limits if room is None else [*limits, room]
    looked_at = [tokenizer.beginning(text, max(bounds)) for text in texts] if bounds else texts
    for text, seen, ids in zip(texts, looked_at, tokenizer.pieces(looked_at), strict=True):
        n = min([len(ids), *limits])
        excerpt = seen if n == len(ids) else tokenizer.text_of(ids[:n])
        found.append(Excerpt(excerpt, n, len(ids), more=len(seen) < len(text)))
    return found
