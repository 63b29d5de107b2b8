"""A language model that reads pictures and writes answers: several conversations at once, each with its own cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament import media
from fundament.backbone.cached import Cache, CachedDecoder
from fundament.backbone.chat_template import ChatTemplate
from fundament.backbone.linear import Linear
from fundament.backbone.sampling import Sampler, choose
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.tile_vision import TileVision
from fundament.backbone.towers.tiles import Crops, Tiles
from fundament.backbone.utterance import Utterance
from fundament.core import DEFAULT_MAX_TOKENS, Array, Delta, Finish, Generate, Item, Media
from fundament.errors import ConversationTooLongError, RowError


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """Tokens with a meaning of their own.

    Attributes:
        first: in front of every conversation.
        last: any of these ends an answer.
        marks: what a picture's tokens are, by the numbers of `tiles`.
    """

    first: int
    last: frozenset[int]
    marks: tuple[int, int, int, int]


@dataclass(slots=True)
class Writing:
    """One conversation on its way.

    Attributes:
        ids: tokens that are read or to be read.
        pictures: states that are added to the embeddings of `ids` until all of them are read, `[added, hidden]`.
        places: which tokens these are for, ascending, int64 `[added]`.
    """

    ids: Array
    cache: Cache
    sampler: Sampler
    utterance: Utterance
    n_prompt: int
    most: int
    pictures: Tensor | None
    places: Array
    n_written: int = 0

    @property
    def n_ahead(self) -> int:
        """Tokens to read before the next one is written."""
        return len(self.ids) - self.cache.n


class PictureWriter:
    """Conversations to answers.

    Args:
        tokenizer: the checkpoint's own.
        template: the checkpoint's own.
        tokens: ids with a meaning.
        tiles: how pictures are cut.
        vision: crops to states.
        decoder: the language model; its embeddings have the added tokens behind the others.
        head: states to scores of tokens.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        tokens: ChatTokens,
        tiles: Tiles,
        vision: TileVision,
        decoder: CachedDecoder,
        head: Linear,
    ) -> None:
        self.tokenizer, self.template, self.tokens, self.tiles = tokenizer, template, tokens, tiles
        self.vision, self.decoder, self.head = vision, decoder, head
        self.token_bytes = decoder.token_bytes
        self.n_bytes = vision.n_bytes + decoder.transformer.n_bytes + head.n_bytes

    def prepare(self, call: Generate) -> list[Item]:
        """The conversation as token ids, its pictures cut up; one that is there twice is cut once.

        Features are `ids`; of each picture `pixels0`, `pixels1`, …; and `places0`, …: the token that each cell of it
        becomes, -1 for none.

        Raises:
            InputError: a picture that cannot be read, or messages that the template refuses.
            ConversationTooLongError: the conversation and the answer do not fit the context.
        """
        context = self.tokenizer.context
        wanted = call.max_tokens or 1
        rendered = self.template.render(call.messages).split(self.template.picture)
        spoken = self.tokenizer.pieces(rendered, refused=context)
        n_tokens = 1 + sum(map(len, spoken))
        features: dict[str, Array] = {}
        ids = [np.array([self.tokens.first]), spoken[0]]
        read: dict[Media, Crops] = {}
        for number, (picture, words) in enumerate(zip(_pictures(call), spoken[1:], strict=True)):
            if picture not in read:
                [pixels] = media.pictures(picture)
                n = self.tiles.count(pixels, picture.origin)
                if n_tokens + n + wanted > context:  # before it is cut, so that memory is bounded by the context
                    n_tokens += n
                    break
                read[picture] = self.tiles.cut(pixels, picture.origin)
            crops = read[picture]
            marks = np.array(self.tokens.marks)[self.tiles.marks(crops.rows, crops.columns)]
            n_tokens += len(marks)
            places = self.tiles.places(crops.rows, crops.columns)
            start = sum(map(len, ids))
            features[f"pixels{number}"] = crops.pixels
            features[f"places{number}"] = np.where(places >= 0, places + start, -1)
            ids += [marks, words]
        if n_tokens + wanted > context:
            raise ConversationTooLongError(n_tokens=n_tokens, n_wanted=wanted, limit=context)
        features["ids"] = np.concatenate(ids).astype(np.int64)
        most = call.max_tokens or min(DEFAULT_MAX_TOKENS, context - n_tokens)
        n_image = sum(int((features[name] >= 0).sum()) for name in features if name.startswith("places"))
        return [
            Item(
                features=features,
                n_tokens=n_tokens + most,
                n_counted=n_tokens,
                n_media={"image": n_image} if n_image else {},
            )
        ]

    @torch.inference_mode()
    def begin(self, call: Generate, item: Item) -> Writing:
        """Make room for the conversation and look at its pictures, at each once."""
        features, device = item.features, self.decoder.transformer.device
        states: list[Tensor] = []
        targets: list[Array] = []
        seen: dict[int, Tensor] = {}
        number = 0
        while (places := features.get(f"places{number}")) is not None:
            pixels = features[f"pixels{number}"]
            if id(pixels) not in seen:
                seen[id(pixels)] = self.vision(torch.from_numpy(pixels).to(device))
            kept = np.flatnonzero(places >= 0)
            states.append(seen[id(pixels)][torch.from_numpy(kept[np.argsort(places[kept])]).to(device)])
            targets.append(np.sort(places[kept]))
            number += 1
        seed = None if call.seed is None else str(call.seed)  # of a number the sign would be lost
        return Writing(
            features["ids"],
            self.decoder.cache(item.n_tokens),
            Sampler(call.temperature, call.top_p, Random(seed)),  # noqa: S311 - it draws words, not secrets
            Utterance(self.tokenizer.plain_text_of, call.stop),
            n_prompt=item.n_counted,
            most=item.n_tokens - item.n_counted,
            pictures=torch.cat(states) if states else None,
            places=np.concatenate(targets) if targets else np.zeros(0, dtype=np.int64),
        )

    @torch.inference_mode()
    def step(self, answers: Sequence[Writing], sizes: Sequence[int]) -> list[Delta | None]:
        """Read the next tokens of each conversation; those that are read to their end get one more.

        Raises:
            RowError: scores that are not finite.
        """
        inputs = [self._inputs(answer, size) for answer, size in zip(answers, sizes, strict=True)]
        states = self.decoder.read(inputs, [answer.cache for answer in answers])
        through = [place for place, answer in enumerate(answers) if answer.n_ahead == sizes[place]]
        tokens = self._choose(states[through], [answers[place].sampler for place in through]) if through else []
        for answer, size in zip(answers, sizes, strict=True):
            answer.cache.n += size
        deltas: list[Delta | None] = [None] * len(answers)
        for place, token in zip(through, tokens, strict=True):
            deltas[place] = self._write(answers[place], token)
        return deltas

    def _choose(self, states: Tensor, samplers: Sequence[Sampler]) -> list[int]:
        """The next token after each state; `states` is `[rows, hidden]`."""
        scores = self.head(states).float()
        if not torch.isfinite(scores).all():
            raise RowError("The model's scores are not finite.")
        return choose(scores, samplers)

    def _inputs(self, answer: Writing, size: int) -> Tensor:
        """What goes into the first layer for the next tokens, `[size, hidden]`."""
        table, start = self.decoder.transformer.tokens, answer.cache.n
        x = F.embedding(torch.from_numpy(answer.ids[start : start + size]).to(table.device), table)
        first, last = np.searchsorted(answer.places, [start, start + size]).tolist()
        if answer.pictures is not None and first < last:
            x[torch.from_numpy(answer.places[first:last] - start).to(table.device)] += answer.pictures[first:last]
        return x

    def _write(self, answer: Writing, token: int) -> Delta:
        answer.pictures = None  # all of it is read
        answer.ids = np.append(answer.ids, token)
        answer.n_written += 1
        finish: Finish | None = None
        if token in self.tokens.last:
            text, finish = answer.utterance.rest(), "stop"
        else:
            text = answer.utterance.add(token)
            if answer.utterance.stopped:
                finish = "stop"
            elif answer.n_written == answer.most:
                text += answer.utterance.rest()
                finish = "stop" if answer.utterance.stopped else "length"
        return Delta(text=text, n_prompt=answer.n_prompt, n_written=answer.n_written, finish=finish)


def _pictures(call: Generate) -> Iterator[Media]:
    return (part for message in call.messages for part in message.parts if isinstance(part, Media))
