"""What a reranker reads of a query and of documents that may be too long: their first tokens, as text again."""

from collections.abc import Sequence
from dataclasses import dataclass

from fundament.backbone.tokenizing import TextTokenizer
from fundament.core import Rerank
from fundament.errors import TooLongError


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a text.

    Attributes:
        text: the whole text, or what its first tokens say.
        n_tokens: of that, without special tokens around it.
        truncated: whether the text was longer.
    """

    text: str
    n_tokens: int
    truncated: bool


def excerpts(
    tokenizer: TextTokenizer, call: Rerank, query_tokens: int | None, document_tokens: int | None
) -> tuple[Excerpt, list[Excerpt]]:
    """What is read of the query, and of each document.

    Args:
        tokenizer: the model's own.
        call: what is asked; its own limits go first.
        query_tokens: most tokens of a query where the call does not say; None means all.
        document_tokens: the same of a document.

    Raises:
        TooLongError: a text longer than that, without `truncate`.
    """
    query = _cut(tokenizer, [call.query], call.max_query_tokens or query_tokens, call.truncate, query=True)[0]
    return query, _cut(tokenizer, call.documents, call.max_document_tokens or document_tokens, call.truncate)


def _cut(
    tokenizer: TextTokenizer, texts: Sequence[str], most: int | None, truncate: bool, *, query: bool = False
) -> list[Excerpt]:
    found = []
    for index, (text, ids) in enumerate(zip(texts, tokenizer.pieces(texts), strict=True)):
        if most is None or len(ids) <= most:
            found.append(Excerpt(text, len(ids), truncated=False))
        elif truncate:
            found.append(Excerpt(tokenizer.text_of(ids[:most]), most, truncated=True))
        else:
            raise TooLongError(index=None if query else index, n_tokens=len(ids), limit=most)
    return found
