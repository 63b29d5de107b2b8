"""`POST /v1/train`: texts and images with labels in; a classifier that has learned from them, new or known, out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID, uuid4

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from fundament.api.auth import owner
from fundament.api.body import Body, ModelName, Truncate, echo, read_body
from fundament.api.classifiers import busy, known_id, take
from fundament.api.classify import MOST_INPUTS, check_dim, embedder, readable, task_of, unit_vectors
from fundament.api.inputs import ImageDoc, Part, TextDoc, check_number, check_some, read_part
from fundament.api.media import opened
from fundament.api.presence import while_awaited
from fundament.api.schemas import BaseUsage, request_body, responses
from fundament.api.state import State, state_of
from fundament.api.wire import json_bytes, written
from fundament.catalog import ModelSpec
from fundament.classifiers import Examples, fit, read_examples, write_examples, write_head
from fundament.core import Embeddings
from fundament.errors import (
    Fault,
    InputError,
    InvalidLabelsError,
    LabelLimitError,
    ResourceLimitError,
    UnavailableError,
)
from fundament.store import classifiers as table
from fundament.store.classifiers import HOLD_SECONDS, Access, Learned, Summary

router = APIRouter(tags=["Classification"])

_LEAST_LABELS = 2
_LONGEST_LABEL = 256  # characters


@dataclass(frozen=True, slots=True)
class Example:
    """An input and the label that is right for it."""

    content: Part
    label: str


def read_training(value: Any) -> list[Example]:
    """The `input` field: `{"text": …, "label": …}`, or a list of these.

    Raises:
        InputError: something else, named by its place.
        InvalidLabelsError: a label that cannot be kept.
    """
    if not isinstance(value, list):
        return [_read_example(value, "body -> input")]
    check_some(value)
    check_number(value, MOST_INPUTS)
    return [_read_example(item, f"body -> input -> {index}") for index, item in enumerate(value)]


def _read_example(value: Any, field: str) -> Example:
    if not isinstance(value, dict):
        message = 'Input should be an object like {"text": "…", "label": "…"}.'
        raise InputError(Fault(field, message, "dict_type", echo(value)))
    content, label = read_part(value, field), value.get("label")
    if label is None:
        raise InputError(Fault(f"{field} -> label", "Field required", "missing", echo(value)))
    if not isinstance(label, str):
        raise InputError(Fault(f"{field} -> label", "Input should be a string.", "string_type", echo(label)))
    if not label.strip() or len(label) > _LONGEST_LABEL:
        raise InvalidLabelsError(
            f"Invalid training labels: a label should have from 1 to {_LONGEST_LABEL} characters ({field})."
        )
    return Example(content, label)


_Label = Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_LABEL, pattern=r"\S")]


class TextTrainingItem(TextDoc):
    """A text and the label that is right for it."""

    label: _Label


class ImageTrainingItem(ImageDoc):
    """An image and the label that is right for it."""

    label: _Label


_Item = TextTrainingItem | ImageTrainingItem


class TrainRequest(Body):
    """With `model` a new classifier, with `classifier_id` more examples for a known one. Other fields are ignored."""

    model: ModelName | None = Field(
        None, description="The embedding model of a new classifier.", examples=["all-minilm-l6-v2"]
    )
    classifier_id: str | None = Field(None, description="The classifier to update, in place of `model`.")
    input: Annotated[
        list[Example],
        BeforeValidator(
            read_training,
            json_schema_input_type=_Item | Annotated[list[_Item], Field(min_length=1, max_length=MOST_INPUTS)],
        ),
    ] = Field(description=f"Up to {MOST_INPUTS} examples; two different labels at least for a new classifier.")
    access: Access | None = Field(
        None,
        description="Who may ask a new classifier: `public`, every key (the default), or `private`, the owner's alone.",
    )
    num_iters: Annotated[int, Field(ge=1)] | None = Field(
        10, description="Most steps of the training; it ends by itself when nothing is left to gain."
    )
    truncate: Truncate = None


class TrainingResponse(BaseModel):
    """What was trained, and on how many examples."""

    classifier_id: UUID
    num_samples: int
    usage: BaseUsage


@dataclass(frozen=True, slots=True)
class Training:
    """What the verb answers, before it is written.

    Attributes:
        classifier_id: what was trained.
        model: what read the inputs.
        n_samples: examples of this request.
        n_tokens: tokens of the inputs; each is read once, however many steps the training takes.
        n_truncated: how many inputs were cut.
    """

    classifier_id: str
    model: str
    n_samples: int
    n_tokens: int
    n_truncated: int


async def train(state: State, request: TrainRequest, caller: str) -> Training:
    """Make a classifier, or let one learn from more examples; what it learned before stays learned.

    Args:
        state: the application's parts.
        request: what is asked.
        caller: who asks, and owns what is made.

    Raises:
        FundamentError: labels that nothing can be learned from, more than a caller may have, a classifier that is
            not the caller's or that is being updated, a model that is not served, a text that is too long.
    """
    if request.classifier_id is not None:
        return await _update(state, request, known_id(request.classifier_id), caller)
    if request.model is None:
        why = "Field required: give model for a new classifier, or classifier_id for a known one."
        raise InputError(Fault("body -> model", why, "missing"))
    return await _create(state, request, embedder(state, request.model), caller)


async def _create(state: State, request: TrainRequest, spec: ModelSpec, caller: str) -> Training:
    labels = _labels_of(request.input)
    if len(labels) < _LEAST_LABELS:
        raise InvalidLabelsError("Invalid training labels: a new classifier needs at least two different labels.")
    most = state.settings.max_classifiers
    _check_labels(labels, state)
    _check_examples(len(request.input), state)
    async with state.store.read() as connection:
        if await table.count(connection, caller) >= most:  # before the work is done, and again below
            raise _too_many_classifiers(most)
    made = await _embed(state, spec, request, task_of(spec))
    examples = _examples(made, request.input, labels)
    learned = await _learn([], examples, labels, request.num_iters)
    async with state.store.write() as connection:
        classifier_id = await table.create(
            connection,
            caller,
            learned,
            model=spec.id,
            task=task_of(spec),
            dim=made.vectors.shape[1],
            access=request.access or "public",
            most=most,
        )
    if classifier_id is None:
        raise _too_many_classifiers(most)
    return Training(classifier_id, spec.id, len(request.input), made.n_tokens, made.n_truncated)


async def _update(state: State, request: TrainRequest, classifier_id: str, caller: str) -> Training:
    async with _held(state, classifier_id, caller) as (known, mark):
        spec = embedder(state, known.model)
        _check_same(known, spec, request, state)
        labels = _labels_of(request.input, known.labels)
        _check_labels(labels, state)
        _check_examples(known.n_examples + len(request.input), state)
        made = await _embed(state, spec, request, known.task)
        check_dim(known, made)
        async with state.store.read() as connection:
            before = await table.examples(connection, classifier_id)
        learned = await _learn(before, _examples(made, request.input, labels), labels, request.num_iters)
        async with state.store.write() as connection:
            if not await table.update(connection, classifier_id, mark, learned):
                raise busy(classifier_id)
    return Training(classifier_id, spec.id, len(request.input), made.n_tokens, made.n_truncated)


@asynccontextmanager
async def _held(state: State, classifier_id: str, caller: str) -> AsyncIterator[tuple[Summary, str]]:
    """Hold a classifier of the caller's against every other process while it is updated."""
    mark = str(uuid4())
    async with state.store.write() as connection:
        known = await take(connection, classifier_id, caller, mark)

    async def renew() -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS / 4)
            with suppress(UnavailableError):  # the mark lasts for three more attempts
                async with state.store.write() as connection:
                    await table.hold(connection, classifier_id, caller, mark)

    renewing = asyncio.ensure_future(renew())
    try:
        yield known, mark
    finally:
        renewing.cancel()
        with suppress(UnavailableError):  # the mark runs out; what was learned is kept, and must not be learned again
            async with state.store.write() as connection:
                await table.release(connection, classifier_id, mark)


async def _embed(state: State, spec: ModelSpec, request: TrainRequest, task: str | None) -> Embeddings:
    sent = readable(state, spec, [example.content for example in request.input])
    async with opened(state, sent) as inputs:
        return await unit_vectors(state, spec, inputs, task=task, truncate=state.cuts(request.truncate))


def _examples(made: Embeddings, given: Sequence[Example], labels: Sequence[str]) -> Examples:
    classes = {label: number for number, label in enumerate(labels)}
    numbers = np.array([classes[example.label] for example in given], np.int16)
    return Examples(made.vectors.astype(np.float16), numbers)


async def _learn(before: Sequence[bytes], new: Examples, labels: Sequence[str], n_steps: int | None) -> Learned:
    """Fit a head to all examples, on a thread: it takes longer than an event loop may stand still."""
    written = write_examples(new)

    def work() -> bytes:
        return write_head(fit(read_examples([*before, written]), len(labels), n_steps=n_steps or 10))

    head = await asyncio.to_thread(work)
    return Learned(labels=labels, head=head, examples=written, n_examples=len(new.classes))


def _labels_of(given: Sequence[Example], known: Sequence[str] = ()) -> list[str]:
    """Every label once, in the order in which they came."""
    return list(dict.fromkeys([*known, *(example.label for example in given)]))


def _check_labels(labels: Sequence[str], state: State) -> None:
    if len(labels) > (most := state.settings.max_classifier_labels):
        raise LabelLimitError(
            f"Label limit exceeded: {len(labels)} labels provided, maximum {most} allowed for one classifier."
        )


def _check_examples(n: int, state: State) -> None:
    if n > (most := state.settings.max_classifier_examples):
        raise ResourceLimitError(
            f"Resource limit exceeded: {n} examples in all, maximum {most} allowed for one classifier."
        )


def _check_same(known: Summary, spec: ModelSpec, request: TrainRequest, state: State) -> None:
    """Refuse an update that says something else than what the classifier was made with.

    Raises:
        InputError: naming the field.
    """
    if request.model is not None and state.find(request.model).id != spec.id:
        message = f"The classifier was made with '{spec.id}' and stays with it; leave model out."
        raise InputError(Fault("body -> model", message, "value_error", echo(request.model)))
    if request.access not in (None, known.access):
        message = f"The classifier was made {known.access} and stays so; leave access out."
        raise InputError(Fault("body -> access", message, "value_error", request.access))


def _too_many_classifiers(most: int) -> ResourceLimitError:
    return ResourceLimitError(
        f"Resource limit exceeded: maximum {most} classifiers allowed. Delete one: DELETE /v1/classifiers/ID"
    )


@router.post(
    "/v1/train",
    summary="Train",
    openapi_extra=request_body(TrainRequest),
    responses=responses(TrainingResponse, errors=(400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504)),
)
async def train_classifier(request: Request) -> Response:
    """Train a classifier on texts with labels, or update one."""
    asked = await read_body(request, TrainRequest)
    found = await while_awaited(request, train(state_of(request), asked, owner(request)))
    request.state.log = {"model": found.model, "inputs": found.n_samples, "tokens": found.n_tokens}
    body = {
        "classifier_id": found.classifier_id,
        "num_samples": found.n_samples,
        "usage": {"total_tokens": found.n_tokens},
    }
    return written(json_bytes(body), found.n_truncated)
