"""Rerankers that answer yes or no: a causal language model judges one document after a prompt.

The prompt is that of the Qwen3-Reranker model cards (Zhang et al., 2025). Only two rows of the output matrix are
needed, and of them the difference: the probability of yes against no is its logistic function.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.decoder import Decoder
from fundament.backbone.device import Placement
from fundament.backbone.excerpts import count_instruction, read_documents, read_query
from fundament.backbone.llama import IGNORED, LAYOUT, PREFIXES
from fundament.backbone.passes import Row, costs, share
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Item, Ranking, Rerank
from fundament.errors import CheckpointError, Fault, InputError, TooLongError

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What relevance means where the caller does not say."""

HEAD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

PROMPT_TOKENS = 8192
"""Most tokens of a prompt where the caller asks for no length of documents."""


class GenerativeReranker:
    """Queries and documents to probabilities.

    Args:
        tokenizer: the checkpoint's own.
        decoder: the checkpoint's own.
        answer: what turns a state into the logarithm of the odds for yes, float32 `[hidden]`.
        spec: how long a prompt may be.
    """

    def __init__(self, tokenizer: TextTokenizer, decoder: Decoder, answer: Tensor, spec: ModelSpec) -> None:
        self.tokenizer, self.decoder, self.answer, self.spec = tokenizer, decoder, answer, spec
        self.n_bytes = decoder.n_bytes
        self.head, self.tail = tokenizer.pieces([HEAD, TAIL])
        self.n_labels = len(tokenizer.pieces([BODY.format(instruction="", query="", document="")])[0])

    def prepare(self, call: Rerank) -> list[Item]:
        """One row per different document; what the prompts begin with alike is their prefix.

        Raises:
            InputError: vectors are asked for, or the instruction is too long.
            TooLongError: a prompt longer than is read, without `truncate`.
        """
        if call.embeddings:
            message = f"Model '{self.spec.id}' answers yes or no and makes no vectors."
            raise InputError(Fault("body -> return_embeddings", message))
        most = self.spec.context if call.max_document_tokens else min(self.spec.context, PROMPT_TOKENS)
        room = most - len(self.head) - len(self.tail)
        # The caller's instruction has at most half of the room, and the query half of what is left.
        n_told = count_instruction(self.tokenizer, call, (room - self.n_labels) // 2)
        query = read_query(self.tokenizer, call, (room - self.n_labels - n_told) // 2)
        documents = read_documents(self.tokenizer, call, room=room)
        instruction = call.instruction or INSTRUCTION
        bodies = self.tokenizer.pieces(
            [BODY.format(instruction=instruction, query=query.text, document=text.text) for text in documents]
        )
        lost = [max(0, len(body) - room) for body in bodies]
        if any(lost) and not call.truncate:
            place = int(np.flatnonzero(lost)[0])
            name = f"Document {call.documents.index(_different(call)[place])}, with its prompt,"
            raise TooLongError(name, n_tokens=most + lost[place], limit=most, more=documents[place].more)
        prompts = [np.concatenate([self.head, body[:room], self.tail]) for body in bodies]
        rows = share(prompts, [np.array([len(prompt) - 1]) for prompt in prompts], self.decoder.most_shared)
        return [
            Item(
                features=row.features,
                n_tokens=cost,
                n_counted=max(0, n_told + query.n_tokens + documents[place].n_tokens - lost[place]),
                n_truncated=documents[place].truncated or lost[place] > 0,
            )
            for place, (row, cost) in enumerate(zip(rows, costs(rows), strict=True))
        ]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The probability of yes of each row, float64 `[]`."""
        states = torch.cat(self.decoder.states([Row.of(item) for item in items]))
        return list(torch.sigmoid((states.float() @ self.answer).cpu().double()).numpy())

    def finish(self, call: Rerank, items: Sequence[Item], arrays: Sequence[Array]) -> Ranking:  # noqa: ARG002
        """The probabilities of one call, in the order of its documents; equal documents have equal ones."""
        of_text = dict(zip(_different(call), arrays, strict=True))
        return Ranking(scores=np.array([of_text[text] for text in call.texts[1]]))


def _different(call: Rerank) -> list[str]:
    return list(dict.fromkeys(call.texts[1]))


def load_generative(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement, shape: Shape) -> GenerativeReranker:
    """A reranker from a causal language model in transformers' names.

    Raises:
        CheckpointError: the checkpoint does not fit, or its tokenizer lacks yes or no.
    """
    weights = checkpoint.read(
        parameters(shape),
        LAYOUT,
        placement,
        prefixes=PREFIXES,
        ignored=IGNORED,
    )
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    answer = read_answer(checkpoint, tokenizer, shape).to(placement.device)
    return GenerativeReranker(tokenizer, Decoder(Transformer(shape, weights)), answer, spec)


def read_answer(checkpoint: Checkpoint, tokenizer: TextTokenizer, shape: Shape) -> Tensor:
    """The row of yes less the row of no of the output matrix, float32 `[hidden]`.

    Raises:
        CheckpointError: a matrix that is not there or of another shape, or words that are no tokens.
    """
    yes, no = tokenizer.id_of("yes"), tokenizer.id_of("no")
    if yes is None or no is None:
        raise CheckpointError(f"{checkpoint.directory}: the tokenizer should have the tokens 'yes' and 'no'")
    tied = checkpoint.config.get("tie_word_embeddings", False)
    wanted = "embed_tokens.weight" if tied else "lm_head.weight"
    name = next((name for name in checkpoint.names if f".{name}".endswith(f".{wanted}")), None)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.directory} has no {wanted}, and tie_word_embeddings of config.json says {tied}: "
            "without an output matrix it cannot answer"
        )
    if (found := checkpoint.shape(name)) != (shape.vocab, shape.hidden):
        raise CheckpointError(f"{name} should have the shape {[shape.vocab, shape.hidden]}, not {list(found)}")
    matrix = checkpoint.tensor(name)
    others = [other for other in checkpoint.names if tied and f".{other}".endswith(".lm_head.weight")]
    for other in others:  # transformers takes it, and does not tie what differs
        alike = checkpoint.shape(other) == found
        if not alike or not torch.equal(checkpoint.tensor(other)[[yes, no]], matrix[[yes, no]]):
            raise CheckpointError(
                f"{checkpoint.directory} has another {other} than {name}, and tie_word_embeddings of config.json says "
                "that they are one: set it to false, or take one away"
            )
    return matrix[yes].float() - matrix[no].float()
