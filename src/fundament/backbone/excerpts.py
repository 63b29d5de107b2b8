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
        n_whole: of the whole text.
    """

    text: str
    n_tokens: int
    n_whole: int

    @property
    def truncated(self) -> bool:
        """Whether the text was longer."""
        return self.n_tokens < self.n_whole


def excerpts(
    tokenizer: TextTokenizer, call: Rerank, query_tokens: int | None = None, document_tokens: int | None = None
) -> tuple[Excerpt, list[Excerpt]]:
    """What is read of the query, and of each document.

    Args:
        tokenizer: the model's own.
        call: what is asked; a length that it names goes before the model's own, and cuts in any case.
        query_tokens: most tokens of a query that the model reads; None means all.
        document_tokens: the same of a document.

    Raises:
        TooLongError: a text longer than the model reads, without `truncate`.
    """
    asked, texts = call.texts
    [query] = _cut(tokenizer, [asked], call.max_query_tokens or query_tokens)
    documents = _cut(tokenizer, texts, call.max_document_tokens or document_tokens)
    if not call.truncate:
        if query.truncated and query_tokens and call.max_query_tokens is None:
            raise TooLongError("The query", n_tokens=query.n_whole, limit=query_tokens)
        for index, document in enumerate(documents):
            if document.truncated and document_tokens and call.max_document_tokens is None:
                raise TooLongError(f"Document {index}", n_tokens=document.n_whole, limit=document_tokens)
    return query, documents


def _cut(tokenizer: TextTokenizer, texts: Sequence[str], most: int | None) -> list[Excerpt]:
    found = []
    for text, ids in zip(texts, tokenizer.pieces(texts), strict=True):
        n = len(ids) if most is None else min(len(ids), most)
        found.append(Excerpt(text if n == len(ids) else tokenizer.text_of(ids[:n]), n, len(ids)))
    return found
