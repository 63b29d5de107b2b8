"""`POST /v1/classify`: texts and images in; out comes the likeliest label of each, with the score of every label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from fundament.api.auth import owner
from fundament.api.body import Body, ModelName, Truncate, echo, read_body
from fundament.api.classifiers import known_id, not_found
from fundament.api.inputs import ImageDoc, Sent, TextDoc, check_number, check_some, read_inputs
from fundament.api.media import check_media, opened, read_bare
from fundament.api.presence import while_awaited
from fundament.api.routes import PlainRoute
from fundament.api.schemas import BaseUsage, request_body, responses
from fundament.api.state import State, state_of
from fundament.api.wire import long_answer, written
from fundament.catalog import ModelSpec
from fundament.classifiers import Floats, apply, likeness, read_head
from fundament.core import Embed, Embeddings, Input
from fundament.errors import Fault, InputError, LabelLimitError, TooLongError
from fundament.store import classifiers as table
from fundament.store.classifiers import Summary
from fundament.vectors import shorten

router = APIRouter(tags=["Classification"], route_class=PlainRoute)

MOST_INPUTS = 512
_MOST_LABELS = 512
_MOST_GROUPS = 8
_MOST_LABELS_OF_GROUP = 64

_Content = str | TextDoc | ImageDoc
Labels = dict[str | None, list[str]]
"""Candidates by the name of their group; a plain list of labels is the one group None."""


def read_labels(value: Any) -> Labels:
    """The `labels` field: a list, or an object of lists. A label that is given twice counts once.

    Raises:
        InputError: something that is no label, named by its place.
        LabelLimitError: more labels or groups than are taken.
    """
    if not isinstance(value, dict):
        return {None: _read_group(value, "body -> labels", _MOST_LABELS)}
    if not value:
        raise InputError(Fault("body -> labels", "Give at least one group of labels.", "too_short", echo(value)))
    if len(value) > _MOST_GROUPS:
        raise LabelLimitError(
            f"Label limit exceeded: {len(value)} groups of labels provided, maximum {_MOST_GROUPS} allowed."
        )
    return {
        name: _read_group(labels, f"body -> labels -> {echo(name)}", _MOST_LABELS_OF_GROUP)
        for name, labels in value.items()
    }


def _read_group(value: Any, field: str, most: int) -> list[str]:
    if not isinstance(value, list):
        message = 'Input should be a list of labels, or an object of such lists like {"group": ["a", "b"]}.'
        raise InputError(Fault(field, message, "list_type", echo(value)))
    check_some(value, field)
    for index, label in enumerate(value):
        if not isinstance(label, str) or not label.strip():
            raise InputError(Fault(f"{field} -> {index}", "A label should be some text.", "string_type", echo(label)))
    labels = list(dict.fromkeys(value))
    if len(labels) > most:
        raise LabelLimitError(
            f"Label limit exceeded: {len(labels)} labels provided, maximum {most} allowed in one list."
        )
    return labels


def _labels(**limits: int) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1, "pattern": r"\S"}, **limits}


class ClassifyRequest(Body):
    """Either `model` and `labels`, or `classifier_id`. Other fields are ignored."""

    model: ModelName | None = Field(
        None, description="The embedding model's id, short or long.", examples=["all-minilm-l6-v2"]
    )
    labels: Annotated[
        Labels | None,
        BeforeValidator(lambda value: value if value is None else read_labels(value)),
        WithJsonSchema(
            {
                "anyOf": [
                    _labels(maxItems=_MOST_LABELS),
                    {
                        "type": "object",
                        "minProperties": 1,
                        "maxProperties": _MOST_GROUPS,
                        "additionalProperties": _labels(maxItems=_MOST_LABELS_OF_GROUP),
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        description=f"The candidates: up to {_MOST_LABELS} labels, or up to {_MOST_GROUPS} groups of up to "
        f"{_MOST_LABELS_OF_GROUP} each, of which every input gets one label per group.",
    )
    classifier_id: str | None = Field(None, description="A trained classifier, in place of `model` and `labels`.")
    input: Annotated[
        list[Sent],
        BeforeValidator(
            read_inputs,
            json_schema_input_type=_Content | Annotated[list[_Content], Field(min_length=1, max_length=MOST_INPUTS)],
        ),
    ] = Field(description=f"What is classified: texts, or images on models that read them; {MOST_INPUTS} at most.")
    truncate: Truncate = None


class ClassificationPredictionLabel(BaseModel):
    """A candidate and how likely it is."""

    label: str
    score: float


class ClassificationPrediction(BaseModel):
    """One input's likeliest label and every label's score, each by group where the labels came in groups."""

    object: str
    index: int
    prediction: str | dict[str, str]
    score: float | dict[str, float]
    predictions: list[ClassificationPredictionLabel] | dict[str, list[ClassificationPredictionLabel]]


class ClassificationResponse(BaseModel):
    """One item per input, in order."""

    usage: BaseUsage
    data: list[ClassificationPrediction]


@dataclass(frozen=True, slots=True)
class Scored:
    """The candidates of a group and how likely each is for each input.

    Attributes:
        labels: the candidates.
        scores: `[inputs, labels]`; each row sums to 1.
    """

    labels: Sequence[str]
    scores: Floats


@dataclass(frozen=True, slots=True)
class Classification:
    """What the verb answers, before it is written.

    Attributes:
        model: what read the inputs.
        groups: by name; a single group without a name is None.
        n_tokens: tokens of the inputs, and of the labels where they were read.
        n_truncated: how many inputs were cut.
    """

    model: str
    groups: Mapping[str | None, Scored]
    n_tokens: int
    n_truncated: int


async def classify(state: State, request: ClassifyRequest, caller: str) -> Classification:
    """Score every label for every input.

    Args:
        state: the application's parts.
        request: what is asked.
        caller: who asks, which decides the classifiers that there are.

    Raises:
        FundamentError: a model that is not served or gives no such vectors, a classifier that is not there, a text
            that is too long.
    """
    if request.classifier_id is not None:
        if request.labels is not None:
            raise InputError(Fault("body -> labels", "A classifier has its own labels: give one of the two."))
        return await _few_shot(state, request, request.classifier_id, caller)
    missing = [name for name in ("model", "labels") if getattr(request, name) is None]
    if missing:
        why = "Field required: give model and labels, or classifier_id."
        raise InputError(*(Fault(f"body -> {name}", why, "missing") for name in missing))
    return await _zero_shot(state, request)


async def _zero_shot(state: State, request: ClassifyRequest) -> Classification:
    assert request.model is not None
    assert request.labels is not None
    spec = embedder(state, request.model)
    sent = readable(state, spec, request.input)
    names = list(dict.fromkeys(chain.from_iterable(request.labels.values())))
    try:  # in one call, so that it is paid for as a whole or not at all
        async with opened(state, sent) as given:
            read = await unit_vectors(
                state,
                spec,
                [*given, *names],
                task=task_of(spec),
                truncate=state.cuts(request.truncate),
                n_recurring=len(names),
            )
    except TooLongError as error:
        if (place := error.index - len(sent)) < 0:
            raise
        n_tokens = f"more than {error.n_tokens}" if error.more else error.n_tokens
        message = f"This label has {n_tokens} tokens, more than the {error.limit} that '{spec.id}' reads."
        raise InputError(Fault("body -> labels", message, "too_long", echo(names[place]))) from error
    inputs, labels = np.split(read.vectors, [len(sent)])
    place_of = {name: place for place, name in enumerate(names)}
    return Classification(
        model=state.answering(request.model),
        groups={
            group: Scored(own, likeness(inputs, labels[[place_of[name] for name in own]]))
            for group, own in request.labels.items()
        },
        n_tokens=read.n_tokens,
        n_truncated=read.n_truncated,
    )


async def _few_shot(state: State, request: ClassifyRequest, classifier_id: str, caller: str) -> Classification:
    classifier_id = known_id(classifier_id)
    async with state.store.read() as connection:
        trained = await table.find(connection, classifier_id, caller)
    if trained is None:
        raise not_found(classifier_id)
    known, spec = trained.summary, embedder(state, trained.summary.model)
    if request.model is not None and state.find(request.model).id != spec.id:
        message = f"The classifier was trained with '{spec.id}' and reads with it; leave model out."
        raise InputError(Fault("body -> model", message, "value_error", echo(request.model)))
    async with opened(state, readable(state, spec, request.input)) as given:
        inputs = await unit_vectors(state, spec, given, task=known.task, truncate=state.cuts(request.truncate))
    check_dim(known, inputs)
    scores = apply(read_head(trained.head), inputs.vectors)
    state.accounts.ledger.ask(classifier_id)
    return Classification(
        model=spec.id,
        groups={None: Scored(known.labels, scores)},
        n_tokens=inputs.n_tokens,
        n_truncated=inputs.n_truncated,
    )


def embedder(state: State, model: str) -> ModelSpec:
    """The served model of that name, which must give one vector per input.

    Raises:
        ModelNotFoundError: there is none.
        InputError: it gives something else.
    """
    spec = state.find_embedder(model)
    if "dense" not in spec.outputs:
        message = f"Model '{spec.id}' gives no single vector per input, which classification needs."
        raise InputError(Fault("body -> model", message))
    return spec


def readable(state: State, spec: ModelSpec, sent: Sequence[Sent]) -> list[Sent]:
    """The inputs as the model reads them, one vector each.

    Raises:
        InputError: too many, or one that it does not read.
    """
    check_number(sent, MOST_INPUTS)
    inputs = read_bare(spec, sent)
    check_media(state, spec, inputs, pages=False)
    return inputs


async def unit_vectors(
    state: State, spec: ModelSpec, inputs: Sequence[Input], *, task: str | None, truncate: bool, n_recurring: int = 0
) -> Embeddings:
    """One vector of unit length per input, read for `task`; the last `n_recurring` of them are asked for often.

    Raises:
        FundamentError: a text that is too long, a server that cannot take it now.
    """
    call = Embed(inputs=inputs, task=task, truncate=truncate, n_recurring=n_recurring)
    result = await state.engine.run(spec.id, call)
    assert isinstance(result, Embeddings)
    return replace(result, vectors=shorten(result.vectors, None, normalized=True))


def check_dim(known: Summary, made: Embeddings) -> None:
    """Refuse vectors that a classifier cannot read, because another model goes by the name of the one that it knows.

    Raises:
        InputError: with both lengths.
    """
    if (dim := made.vectors.shape[1]) != known.dim:
        message = (
            f"The classifier was trained on vectors of {known.dim} numbers, and '{known.model}' now gives {dim}. "
            "Train a new one."
        )
        raise InputError(Fault("body -> classifier_id", message, "value_error", known.id))


def task_of(spec: ModelSpec) -> str | None:
    """The task of texts that are classified, and of labels: the model's own for that, else its usual one."""
    return "classification" if "classification" in spec.tasks else spec.default_task


@router.post(
    "/v1/classify",
    summary="Classify",
    openapi_extra=request_body(ClassifyRequest),
    responses=responses(ClassificationResponse, errors=(400, 401, 403, 404, 413, 415, 429, 500, 503, 504)),
)
async def classify_texts(request: Request) -> Response:
    """Say which label fits each input, by the labels' own words or by what a classifier has learned."""
    asked = await read_body(request, ClassifyRequest)
    found = await while_awaited(request, classify(state_of(request), asked, owner(request)))
    request.state.log = {"model": found.model, "inputs": len(asked.input), "tokens": found.n_tokens}
    return written(await _write(found, len(asked.input)), found.n_truncated)


async def _write(found: Classification, n_inputs: int) -> bytes:
    """The answer in the order of keys that the hosted API uses (captured): usage, data; labels as they were given."""

    def item(index: int, _: int) -> dict[str, Any]:
        best = {name: _best(scored, index) for name, scored in found.groups.items()}
        keys = ("prediction", "score", "predictions")
        values = {key: {name: one[key] for name, one in best.items()} for key in keys}
        return {"object": "classification", "index": index, **(best.get(None) or values)}

    n_labels = sum(len(scored.labels) for scored in found.groups.values())
    head = {"usage": {"total_tokens": found.n_tokens}}
    return await long_answer(head, "data", range(n_inputs), item, numbers_per_row=4 * n_labels)


def _best(scored: Scored, index: int) -> dict[str, Any]:
    scores = scored.scores[index].tolist()
    best = int(scored.scores[index].argmax())
    every = [{"label": label, "score": score} for label, score in zip(scored.labels, scores, strict=True)]
    return {"prediction": scored.labels[best], "score": scores[best], "predictions": every}
