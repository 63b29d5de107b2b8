"""SPLADE (Formal et al., 2021): a masked language model whose predictions say how much each word piece weighs.

BERT, DistilBERT and RoBERTa with their heads. Some are for documents alone: `idf.json` beside them has the weights of a
query's own word pieces, and no query runs through the model. `elser-v2` is such a model of an operator's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.bert import (
    ATTENTION,
    DISTILBERT,
    EMBEDDINGS,
    MLP,
    UNUSED,
    check_positions,
    read_distilbert_shape,
    read_shape,
)
from fundament.backbone.checkpoint import Checkpoint, Source, Weights
from fundament.backbone.device import Placement
from fundament.backbone.linear import Activation, activate
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.sentence import read_modules
from fundament.backbone.sparse import sparse, sparse_rows, sparse_vectors
from fundament.backbone.tokenizing import TextTokenizer, check_vocabulary
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Item, SparseVectors
from fundament.errors import CheckpointError, Fault, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a kind of masked language model calls its tensors.

    Attributes:
        layout: of the backbone, behind `prefix`.
        prefix: before every name of the backbone.
        transform: the dense layer before the vocabulary.
        norm: what follows it.
        decoder: the vocabulary's matrix, which a checkpoint may leave out: it is then the table of tokens.
        bias: where the vocabulary's bias is, in the order in which it is looked for.
    """

    layout: Mapping[str, Source]
    prefix: str
    transform: str
    norm: str
    decoder: str
    bias: tuple[str, ...]


KINDS = {  # `model_type` → names
    "bert": Names(
        layout=EMBEDDINGS | ATTENTION | MLP,
        prefix="bert.",
        transform="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        bias=("cls.predictions.decoder", "cls.predictions"),
    ),
    "distilbert": Names(
        layout=DISTILBERT,
        prefix="distilbert.",
        transform="vocab_transform",
        norm="vocab_layer_norm",
        decoder="vocab_projector",
        bias=("vocab_projector",),
    ),
    "roberta": Names(
        layout=EMBEDDINGS | ATTENTION | MLP,
        prefix="roberta.",
        transform="lm_head.dense",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
        bias=("lm_head.decoder", "lm_head"),
    ),
}
ARCHITECTURES = ["BertForMaskedLM", "DistilBertForMaskedLM", "RobertaForMaskedLM"]

_BLOCK_NUMBERS = 2**24  # predictions that are held at a time: 64 MB in float32, 549 tokens of BERT's vocabulary

# `activation_function` of SpladePooling → how often the logarithm is taken.
_LOGARITHMS = {"relu": 1, "log1p_relu": 2}


def recognises(config: dict[str, Any]) -> bool:
    """A masked language model of one of the three kinds, by its head: without one it makes dense vectors."""
    plain = config.get("position_embedding_type", "absolute") == "absolute"
    return config.get("model_type") in KINDS and plain and (config.get("architectures") or [""])[0] in ARCHITECTURES


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """From a token's state to a number for each entry of the vocabulary.

    Attributes:
        transform: `[hidden, hidden]`, with its bias and activation.
        norm: weight and bias of the layer normalisation behind it.
        vocabulary: `[vocab, hidden]`, with its bias.
    """

    transform: tuple[Tensor, Tensor]
    activation: Activation
    norm: tuple[Tensor, Tensor]
    norm_eps: float
    vocabulary: tuple[Tensor, Tensor]

    def before(self, hidden: Tensor) -> Tensor:
        """All but the product with the vocabulary, `[tokens, hidden]`."""
        inner = activate(F.linear(hidden, *self.transform), self.activation)
        return F.layer_norm(inner, inner.shape[-1:], *self.norm, self.norm_eps)

    def most(self, rows: Sequence[Tensor]) -> Tensor:
        """The greatest number of each row and entry, float32 `[rows, vocab]`; those below zero are zero.

        Args:
            rows: what `before` gives of each, `[tokens, hidden]`; together few tokens, or one row however long.
        """
        if len(rows) == 1:
            best = [torch.stack([self._all(block).amax(0) for block in rows[0].split(self.n_tokens)]).amax(0)]
        else:
            best = [part.amax(0) for part in self._all(torch.cat(list(rows))).split([len(row) for row in rows])]
        return torch.stack(best).float().clamp(min=0)

    def _all(self, states: Tensor) -> Tensor:
        return F.linear(states, *self.vocabulary)

    @property
    def n_tokens(self) -> int:
        """How many tokens go through the vocabulary together."""
        return max(1, _BLOCK_NUMBERS // len(self.vocabulary[0]))


class SPLADE:
    """Texts to weights of word pieces.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the checkpoint's own.
        prediction: its head.
        n_logarithms: how often the logarithm of one more than a weight is taken.
        query_weights: of each entry of the vocabulary, float32 `[vocab]`, where queries do not run through the model.
        spec: the model's name.

    Raises:
        CheckpointError: the tokenizer has more tokens than the weights.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        transformer: Transformer,
        prediction: Prediction,
        n_logarithms: int,
        query_weights: Array | None,
        spec: ModelSpec,
    ) -> None:
        check_vocabulary(tokenizer, spec, transformer.shape.vocab)
        self.tokenizer, self.transformer, self.prediction = tokenizer, transformer, prediction
        self.n_logarithms, self.query_weights, self.spec = n_logarithms, query_weights, spec
        own = [*prediction.transform, *prediction.norm, *prediction.vocabulary]
        tied = prediction.vocabulary[0] is transformer.tokens
        self.n_bytes = transformer.n_bytes + sum(tensor.nbytes for tensor in own)
        self.n_bytes -= transformer.tokens.nbytes if tied else 0

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text; a query that does not run through the model is looked up here.

        Raises:
            InputError: another output than weights, or a text without tokens.
            TooLongError: a text longer than the context, without `truncate`.
        """
        if call.output != "sparse":
            raise InputError(Fault("body -> model", f"Model '{self.spec.id}' gives a weight per word piece."))
        found = self.tokenizer.read(dict(enumerate(call.texts)), truncate=call.truncate)
        known = self._look_up(call.texts) if call.role == "query" and self.query_weights is not None else None
        return [
            Item(
                features={"ids": tokens.ids} if known is None else {"known": known[index]},
                # A row that is looked up shares no batch with those that run, whose lengths a batch is made by.
                n_tokens=len(tokens.ids) if known is None else 1,
                mate=known is not None,
                n_counted=tokens.n_own,
                n_truncated=tokens.truncated,
            )
            for index, tokens in enumerate(found)
        ]

    def _look_up(self, texts: Sequence[str]) -> list[Array]:
        """Ids over weights, `[2, n]`: each distinct word piece of the text once, however often it stands there."""
        assert self.query_weights is not None
        most = self.tokenizer.context
        distinct = [np.unique(ids[:most]) for ids, _ in self.tokenizer.first_pieces(texts, most)]
        return [sparse(ids, self.query_weights[ids]) for ids in distinct]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """Ids over weights of each row, float32 `[2, n]`."""
        if "known" in items[0].features:
            return [item.features["known"] for item in items]
        packed, order = pack_items(items, self.transformer.device)
        lengths = np.diff(packed.bounds).tolist()
        arrays: list[Array] = []
        with torch.inference_mode():
            states = unsort(self.prediction.before(self.transformer(packed)).split(lengths), order)
            for start, stop in self._shares([len(row) for row in states]):
                weights = self.prediction.most(states[start:stop])
                for _ in range(self.n_logarithms):
                    weights = weights.log1p()
                arrays += sparse_rows(weights)
        return arrays

    def _shares(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Rows from where to where go through the vocabulary together, so that what is held stays small."""
        bounds, start, total = [], 0, 0
        for place, length in enumerate(lengths):
            if place > start and total + length > self.prediction.n_tokens:
                bounds.append((start, place))
                start, total = place, 0
            total += length
        return [*bounds, (start, len(lengths))]

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> SparseVectors:  # noqa: ARG002
        """The weights of one call, in its order."""
        return sparse_vectors(arrays, self.spec, self.tokenizer)


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> SPLADE:
    """A sparse encoder from a masked language model in transformers' names.

    Raises:
        CheckpointError: the checkpoint does not fit, has no head, or pools in a way that is not served.
    """
    config = checkpoint.config
    kind = config.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"{checkpoint.directory}: '{spec.id}' is served from a masked language model in safetensors, of the kinds "
            f"{', '.join(KINDS)}; config.json says model_type '{kind}'"
        )
    names, shape = KINDS[kind], read_kind(config)
    check_positions(checkpoint, spec, shape)
    head = head_layout(checkpoint, names)
    weights = checkpoint.read(
        parameters(shape),
        names.layout,
        placement,
        prefixes=(names.prefix,),
        ignored="|".join([UNUSED, *(rf"{part}\.(weight|bias)" for part in (*head.values(), *names.bias))]),
    )
    read = read_head(checkpoint, head, shape, placement)
    transformer = Transformer(shape, weights)
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    prediction = Prediction(
        transform=(read["transform.weight"], read["transform.bias"]),
        # DistilBERT's head has the backbone's activation, BERT's too; RoBERTa's is GELU whatever the backbone has.
        activation="gelu" if kind == "roberta" else shape.activation,
        norm=(read["norm.weight"], read["norm.bias"]),
        norm_eps=shape.norm_eps,
        vocabulary=(read.get("decoder.weight", transformer.tokens), read["vocabulary.bias"]),
    )
    return SPLADE(
        tokenizer, transformer, prediction, read_logarithms(checkpoint), read_idf(checkpoint, tokenizer, shape), spec
    )


def read_kind(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` tells, in BERT's keys or in DistilBERT's.

    Raises:
        CheckpointError: a key is missing, or the activation is not served.
    """
    if config["model_type"] != "distilbert":
        # RoBERTa counts positions from the one after the padding token's id.
        offset = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
        return replace(read_shape(config), position_offset=offset)
    return read_distilbert_shape(config)


def head_layout(checkpoint: Checkpoint, names: Names) -> dict[str, str]:
    """Where the head's modules are.

    Raises:
        CheckpointError: it has none.
    """
    bias = next((name for name in names.bias if f"{name}.bias" in checkpoint.names), None)
    if bias is None or f"{names.transform}.weight" not in checkpoint.names:
        raise CheckpointError(
            f"{checkpoint.directory} has no head that predicts tokens ({names.transform}), so no sparse vectors. "
            'If it makes dense ones, its config.json should say so: "architectures": ["BertModel"]'
        )
    head = {"transform": names.transform, "norm": names.norm, "vocabulary": bias}
    if f"{names.decoder}.weight" in checkpoint.names:
        return head | {"decoder": names.decoder}
    if checkpoint.config.get("tie_word_embeddings") is False:
        raise CheckpointError(f"{checkpoint.directory} has no {names.decoder}.weight, and config.json ties no weights")
    return head


def read_head(checkpoint: Checkpoint, head: Mapping[str, Source], shape: Shape, placement: Placement) -> Weights:
    """The head's tensors.

    Raises:
        CheckpointError: some are missing or of other shapes.
    """
    wanted: dict[str, tuple[int, ...]] = {
        "transform.weight": (shape.hidden, shape.hidden),
        "transform.bias": (shape.hidden,),
        "norm.weight": (shape.hidden,),
        "norm.bias": (shape.hidden,),
        "vocabulary.bias": (shape.vocab,),
    }
    if "decoder" in head:
        wanted["decoder.weight"] = (shape.vocab, shape.hidden)
    return checkpoint.read(wanted, head, placement, ignored=".*")


def read_logarithms(checkpoint: Checkpoint) -> int:
    """How often the logarithm is taken, as sentence-transformers' SpladePooling says; once where nothing says so.

    Raises:
        CheckpointError: a pooling that is not served, or several that differ.
    """
    found = set()
    named = read_modules(checkpoint).get("SpladePooling")
    for path in sorted(checkpoint.directory.glob(f"{named or '*SpladePooling'}/config.json")):
        told = checkpoint.json(str(path.relative_to(checkpoint.directory)))
        strategy, activation = told.get("pooling_strategy", "max"), told.get("activation_function", "relu")
        if strategy != "max" or activation not in _LOGARITHMS:
            raise CheckpointError(
                f"{path}: pooling '{strategy}' of '{activation}' is not served; known is 'max' of {list(_LOGARITHMS)}"
            )
        found.add(_LOGARITHMS[activation])
    if len(found) > 1:
        raise CheckpointError(f"{checkpoint.directory}: its SpladePooling folders disagree; keep the right one")
    return found.pop() if found else 1


def read_idf(checkpoint: Checkpoint, tokenizer: TextTokenizer, shape: Shape) -> Array | None:
    """The weight of each entry of the vocabulary in a query, float32 `[vocab]`; None where queries run as documents do.

    They are in `idf.json`, token → weight, or where sentence-transformers saved a Router, in the folder that its
    `router_config.json` names for queries.

    Raises:
        CheckpointError: weights of unknown tokens, or of no numbers.
    """
    told = checkpoint.json("idf.json", default={})
    if not told:
        return _read_routed(checkpoint, shape)
    weights = np.zeros(shape.vocab, dtype=np.float32)
    for token, weight in told.items():
        number = tokenizer.id_of(token)
        if number is None or number >= shape.vocab or not isinstance(weight, int | float):
            raise CheckpointError(f"{checkpoint.directory}/idf.json: {token!r}: {weight!r} weighs no known token")
        weights[number] = weight
    return weights


def _read_routed(checkpoint: Checkpoint, shape: Shape) -> Array | None:
    routes = checkpoint.json("router_config.json", default={}).get("structure", {})
    names = [name for name in routes.get("query", []) if name.endswith("SparseStaticEmbedding")]
    through = [name for name in routes.get("document", []) if name and not name.endswith("SpladePooling")]
    if through or (routes.get("query", []) not in (names, routes.get("document", []))):
        raise CheckpointError(
            f"{checkpoint.directory}/router_config.json: served are documents that run through the model of this very "
            "directory, and queries that do too or are looked up"
        )
    if not names:
        return None
    folder = Checkpoint(checkpoint.directory / names[0])
    if list(folder.names) != ["weight"] or folder.shape("weight") != (shape.vocab,):
        raise CheckpointError(f"{folder.directory} should hold one tensor, weight, of the shape [{shape.vocab}]")
    return folder.tensor("weight").float().numpy()
