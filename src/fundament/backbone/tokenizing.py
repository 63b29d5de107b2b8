"""Text to token ids, by the checkpoint's own `tokenizer.json` and its post-processor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from fundament.backbone.chunking import Joint
from fundament.catalog import ModelSpec
from fundament.core import Array
from fundament.errors import CheckpointError, Fault, InputError, TooLongError

_MARKS = " \n。、，！？"  # between words, or right behind one
_CHARACTERS_PER_TOKEN = 32  # of texts that are looked at whole: several times what languages have
_SLICE = 64  # texts at a time: letting go of thousands of encodings at once would hold up every other thread


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text as token ids.

    Attributes:
        ids: int64 `[n]`, special tokens included, at most the context.
        n_whole: tokens of the text as far as it was looked at; more than `len(ids)` where it was cut.
        is_whole: whether that is all of it.
        n_own: tokens of the caller's own text as read: without those of a prefix alone, with special tokens, less what
            was cut.
    """

    ids: Array
    n_whole: int
    n_own: int
    is_whole: bool = True

    @property
    def truncated(self) -> bool:
        """Whether the text was longer than the context."""
        return self.n_whole > len(self.ids)


@dataclass(frozen=True, slots=True)
class PairFrame:
    """The special tokens around two texts that are read as one, int64.

    Attributes:
        before: in front of the first text.
        between: behind the first text and in front of the second.
        after: behind the second text.
        n_first: how many of `between` are of the first text's type; all where the tokenizer knows no types.
        typed: whether what follows those is of type 1.
    """

    before: Array
    between: Array
    after: Array
    n_first: int
    typed: bool

    @property
    def n_special(self) -> int:
        """Tokens that a pair has beside those of its texts."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: Array, second: Array) -> tuple[Array, int]:
        """The ids of a pair, and the place of its first token of type 1: the end where there is none."""
        ids = np.concatenate([self.before, first, self.between, second, self.after])
        return ids, len(self.before) + len(first) + self.n_first if self.typed else len(ids)


class TextTokenizer:
    """A checkpoint's tokenizer. It is never changed after it is made, so threads share it.

    Args:
        source: where `tokenizer.json` lies, or the tokenizer itself.
        context: most tokens of a text, special tokens included.
    """

    def __init__(self, source: Path | Tokenizer, context: int) -> None:
        self._tokenizer = source if isinstance(source, Tokenizer) else _read(source)
        # Padding and truncation saved in the file are training settings; both are decided here.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.context = context
        self.n_before, self.n_after = self._special_tokens_around()
        if context <= self.n_before + self.n_after:
            raise CheckpointError(f"a context of {context} leaves no room for a text beside special tokens")
        marks = "".join(mark for mark in _MARKS if _divides(self._tokenizer, mark))
        self._word_end = re.compile(f"(?<=[^\\W_])[{marks}]") if marks else None

    @property
    def n_vocab(self) -> int:
        """Entries of the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def n_ids(self) -> int:
        """One more than the highest id, which is more than `n_vocab` where some are free."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None where it has no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def first_id_of(self, *tokens: str) -> int | None:
        """The id of the first of some tokens that the vocabulary has: families write one thing in different ways."""
        return next((found for token in tokens if (found := self.id_of(token)) is not None), None)

    def token_of(self, number: int) -> str:
        """The token of an id; an id that the vocabulary leaves free is its own name."""
        token: str | None = self._tokenizer.id_to_token(number)
        return str(number) if token is None else token

    def tokens_of(self, ids: Array) -> list[str]:
        """The token of each id."""
        return [self.token_of(number) for number in ids.tolist()]

    def pieces(self, texts: Sequence[str], *, refused: int | None = None) -> list[Array]:
        """Token ids of each text alone: no special tokens, and as long as the text is.

        Args:
            texts: what to read.
            refused: so many tokens and more are refused: of a text that has many more no more than these are made.
        """
        found: list[Array] = []
        if refused is not None:
            texts = [self._enough(text, refused) for text in texts]
        for start in range(0, len(texts), _SLICE):
            part = self._tokenizer.encode_batch_fast(texts[start : start + _SLICE], add_special_tokens=False)
            found += [np.array(encoding.ids, dtype=np.int64) for encoding in part]
        return found

    def first_pieces(self, texts: Sequence[str], most: int) -> list[tuple[Array, bool]]:
        """The same, where the first `most` are read: of a text with many more than these only some more are made.

        Returns:
            Of each text its ids, more than `most` where it has them, and whether they are all that it has.
        """
        looked_at = [self.beginning(text, most) for text in texts]
        whole = [len(beginning) == len(text) for beginning, text in zip(looked_at, texts, strict=True)]
        return list(zip(self.pieces(looked_at), whole, strict=True))

    def _enough(self, text: str, most: int) -> str:
        """The text; of a very long one a beginning of twice as many tokens, wherever it ends."""
        size = _CHARACTERS_PER_TOKEN * most
        while size < len(text):
            beginning = text[:size]
            if len(self._tokenizer.encode_batch_fast([beginning])[0]) > 2 * most:
                return beginning
            size *= 4
        return text

    def text_of(self, ids: Array) -> str:
        """What token ids say, special tokens included."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def plain_text_of(self, ids: Sequence[int]) -> str:
        """What token ids say, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def special_tokens(self) -> list[str]:
        """The tokens that no text is meant to say."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def read(self, texts: Mapping[int, str], prefix: str = "", *, truncate: bool) -> list[Tokens]:
        """As `encode`, of texts that make a row each.

        Args:
            texts: what to read, by its place among the inputs of a call.
            prefix: put before each text.
            truncate: cut what is longer than the context, in place of refusing it.

        Raises:
            InputError: a text without tokens.
            TooLongError: a text longer than the context, without `truncate`.
        """
        found = self.encode([*texts.values()], prefix)
        for index, tokens in zip(texts, found, strict=True):
            if tokens.truncated and not truncate:
                raise TooLongError(index=index, n_tokens=tokens.n_whole, limit=self.context, more=not tokens.is_whole)
            if not len(tokens.ids):
                raise InputError(Fault(f"body -> input -> {index}", "This text has no tokens for this model."))
        return found

    def encode(self, texts: Sequence[str], prefix: str = "", *, most: int | None = None) -> list[Tokens]:
        """Token ids of each text after the prefix: special tokens stay, the text loses its end.

        Of a text of many times the context only a beginning is looked at.

        Args:
            texts: what to read.
            prefix: put before each text.
            most: tokens that are kept, special tokens included; left out, the context.
        """
        most = self.context if most is None else most
        found: list[Tokens] = []
        for start in range(0, len(texts), _SLICE):
            part = [prefix + text for text in texts[start : start + _SLICE]]
            looked_at = [self.beginning(text, max(most, self.context)) for text in part]
            # Where each token ends is asked for only where a prefix has to be told from the text.
            encodings = (self._tokenizer.encode_batch if prefix else self._tokenizer.encode_batch_fast)(looked_at)
            for text, beginning, encoding in zip(part, looked_at, encodings, strict=True):
                found.append(self._cut(encoding, len(prefix), most, is_whole=len(beginning) == len(text)))
        return found

    def beginning(self, text: str, most: int) -> str:
        """The text; of a very long one a beginning that has the same first `most` tokens, and more than those.

        It ends with a word, before a space or, as Chinese and Japanese have none, a comma or stop of theirs: for a
        tokenizer that takes words one by one its tokens are those of the whole text.
        """
        size = _CHARACTERS_PER_TOKEN * most
        while self._word_end is not None and 2 * size < len(text):
            ends = [match.start() for match in self._word_end.finditer(text, size // 2, size)]
            if not ends:
                break
            beginning = text[: ends[-1]]
            if len(self._tokenizer.encode_batch_fast([beginning])[0]) > most + self.n_before + self.n_after:
                return beginning
            size *= 4
        return text

    def encode_parts(self, pieces: Sequence[Sequence[str]], prefix: str) -> Joint:
        """The ids of texts in parts, one after the other with nothing between them, the prefix before the first.

        Each piece is tokenized whole and apart from the others, so that no token reaches from one into the next. A
        token belongs to the part in which it ends.
        """
        ids: list[int] = []
        n_tokens = [0] * sum(map(len, pieces))
        n_prefix = done = 0
        for parts in pieces:
            before = prefix if done == 0 else ""
            encoding = self._tokenizer.encode(before + "".join(parts), add_special_tokens=False)
            ends = np.cumsum([len(before), *map(len, parts)])
            owners = np.searchsorted(ends, [stop for _, stop in encoding.offsets])
            # A token of no characters, as the mark of a word's beginning, is the prefix's, or else the first part's.
            counts = np.bincount(np.maximum(owners, 0 if before else 1), minlength=len(ends))
            n_prefix += int(counts[0])
            n_tokens[done : done + len(parts)] = counts[1:].tolist()
            ids += encoding.ids
            done += len(parts)
        return Joint(np.array(ids, dtype=np.int64), n_prefix + np.cumsum([0, *n_tokens]))

    def enclose(self, ids: Array) -> Array:
        """Put the special tokens of a text around ids that have none."""
        around = self._tokenizer.encode("a").ids
        return np.concatenate(
            [around[: self.n_before], ids, around[len(around) - self.n_after :]], dtype=np.int64, casting="unsafe"
        )

    def pair_frame(self, *, led: bool) -> PairFrame:
        """What the post-processor puts around two texts.

        Args:
            led: whether a token in front of them is needed.

        Raises:
            CheckpointError: it puts nothing there, repeats or turns round the texts, or gives them other types than 0
                and then 1.
        """
        encoding = self._tokenizer.encode("a", "a")
        ids, types = np.array(encoding.ids, dtype=np.int64), np.array(encoding.type_ids)
        first, second = ([i for i, text in enumerate(encoding.sequence_ids) if text == side] for side in (0, 1))
        typed = types[: first[-1] + 1].any() or types.max() > 1 or (np.diff(types) < 0).any()
        if typed or first + second != _own(encoding):  # of a text that comes twice, one place alone is told
            raise CheckpointError("tokenizer.json lays out a pair of texts in a way that is not served")
        cuts = [first[0], first[-1] + 1, second[0], second[-1] + 1]
        if led and first[0] == 0:
            raise CheckpointError("tokenizer.json puts no special token before a pair of texts, so nothing is scored")
        before, _, between, _, after = np.split(ids, cuts)
        n_first = int((types[cuts[1] : cuts[2]] == 0).sum())
        return PairFrame(before, between, after, n_first, typed=bool(types[-1]))

    def _special_tokens_around(self) -> tuple[int, int]:
        encoding = self._tokenizer.encode("a")
        own, n = _own(encoding), len(encoding)
        if any(encoding.type_ids) or own != [place for place, text in enumerate(encoding.sequence_ids) if text == 0]:
            raise CheckpointError("tokenizer.json repeats a text, or gives its tokens types that are not served")
        inner = own or [n]
        return inner[0], n - 1 - inner[-1]

    def _cut(self, encoding: Encoding, n_prefix: int, most: int, *, is_whole: bool) -> Tokens:
        ids = encoding.ids
        n_whole = n_own = len(ids)
        if n_prefix:  # a token that reaches from the prefix into the text is the text's
            n_own = self.n_before + self.n_after + sum(stop > n_prefix for _, stop in encoding.offsets)
        if n_whole > most:
            head = ids[: most - self.n_after]
            ids = head + ids[n_whole - self.n_after :]
        return Tokens(np.array(ids, dtype=np.int64), n_whole, max(0, n_own - (n_whole - len(ids))), is_whole)


def _divides(tokenizer: Tokenizer, mark: str) -> bool:
    """Whether a word is tokenized apart from a mark that follows it; some tokenizers read a text as one word."""
    normalizer, divider = tokenizer.normalizer, tokenizer.pre_tokenizer
    if divider is None:
        return False
    for word in "a", "字":
        text = f"{word}{mark}{word}"
        if normalizer is not None:
            word, text = normalizer.normalize_str(word).rstrip(), normalizer.normalize_str(text)
        if not any(stop == len(word) for _, (_, stop) in divider.pre_tokenize_str(text)):
            return False
    return True


def _own(encoding: Encoding) -> list[int]:
    """The places of the tokens that are of a text."""
    return [place for place, special in enumerate(encoding.special_tokens_mask) if not special]


def check_vocabulary(tokenizer: TextTokenizer, spec: ModelSpec, n_embeddings: int) -> None:
    """Compare the tokenizer of a directory of one's own with the weights' table of tokens.

    Raises:
        CheckpointError: it has tokens for which there is no row.
    """
    if not spec.repo and (n_ids := tokenizer.n_ids) > n_embeddings:
        raise CheckpointError(
            f"the tokenizer knows {n_ids} tokens, the weights {n_embeddings}; "
            "take the tokenizer.json that belongs to them"
        )


def _read(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{directory} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
