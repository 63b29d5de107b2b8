"""`POST /v1/embeddings`: texts and media in; out comes a vector each, or a vector or a weight per token."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Request, Response
from pydantic import (
    AliasChoices,
    BeforeValidator,
    FailFast,
    Field,
    StringConstraints,
    WithJsonSchema,
)

from fundament.api.answers import EmbeddingResponse, EmbeddingsAnswer, cut, write
from fundament.api.body import Body, ModelName, Truncate, echo, read_body
from fundament.api.inputs import Alone, Inputs, check_number
from fundament.api.media import check_media, opened, read_bare, references
from fundament.api.presence import while_awaited
from fundament.api.routes import PlainRoute
from fundament.api.schemas import request_body, responses
from fundament.api.state import State, state_of
from fundament.api.wire import written
from fundament.catalog import ModelSpec
from fundament.core import Bill, Embed, Output, Priority, Role
from fundament.errors import Fault, InputError
from fundament.vectors import Encoding

router = APIRouter(route_class=PlainRoute)


_ENCODINGS = list(get_args(Encoding))


def _as_list(value: Any) -> Any:
    if value is None:
        return ["float"]
    return value if isinstance(value, list) else [value]


class EmbeddingsRequest(Body):
    """Fields that a model does not take are ignored, as the hosted API does; wrong values are refused."""

    model: ModelName = Field(description="The model's id, short or long.", examples=["all-minilm-l6-v2"])
    input: Inputs
    task: str | None = Field(None, description="What the vectors are for; see the model's own list.")
    prompt_name: str | None = Field(
        None, description="With the older tasks `retrieval` and `code` of jina-embeddings-v4: `query` or `passage`."
    )
    instruction: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        None, description="What the vectors are for in your own words, in place of the task's (Qwen3-Embedding)."
    )
    dimensions: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Keep this many numbers of each vector (Matryoshka models)."
    )
    normalized: bool | None = Field(True, description="Scale each vector to unit length.")
    truncate: Truncate = None
    embedding_type: Annotated[
        list[Encoding],
        Field(min_length=1, max_length=len(_ENCODINGS)),
        FailFast(),
        BeforeValidator(_as_list),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "enum": _ENCODINGS},
                    {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": len(_ENCODINGS),
                        "items": {"type": "string", "enum": _ENCODINGS},
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        ["float"],
        validation_alias=AliasChoices("embedding_type", "encoding_format", "encoding_type", "embedding_types"),
        description="`float`, `base64`, `binary`, `ubinary`, or a list of these: then `embedding` is keyed by type. "
        "Also read as `encoding_format`, `encoding_type` and `embedding_types`.",
    )
    late_chunking: bool | None = Field(
        None,
        description="Read all inputs as one text, then pool each one's part: one vector per input; of a "
        "string outside a list, one per sentence, and `index` counts sentences.",
    )
    late_chunking_window: Annotated[int, Field(gt=0, le=131_072)] | None = Field(
        None,
        description="With late_chunking: tokens per window. What does not fit one window is read in several that "
        "overlap, in place of being refused; at most the model's context.",
    )
    return_multivector: bool | None = Field(None, description="One vector per token, under `embeddings`.")
    return_tokenized_input: bool | None = Field(
        None, description="With one vector per token: the tokens too, under `tokenized_input`."
    )
    return_sparse: bool | None = Field(None, description="A weight per token of the text (bge-m3).")
    input_type: str | None = Field(
        None, description="The side of the search that the input is on: `query` or `document` (ColBERT, sparse models)."
    )


R = TypeVar("R", bound=EmbeddingsRequest)


async def embed(
    state: State,
    request: EmbeddingsRequest,
    *,
    priority: Priority = Priority.INTERACTIVE,
    caller: str = "",
    bill: Bill | None = None,
) -> EmbeddingsAnswer:
    """Check what the model takes, run it, cut and scale its vectors.

    Args:
        state: the application's parts.
        request: what is asked.
        priority: the lane.
        caller: who asks, where that is not the request that runs.
        bill: who pays, likewise.

    Raises:
        FundamentError: a model that is not served, a field that it does not take, an input that cannot be read or is
            too long.
    """
    spec, request = state.find_embedder(request.model), as_named(state, request)
    check_number(request.input, state.settings.max_inputs)
    sent = read_bare(spec, request.input)
    check_media(state, spec, sent)
    check(state, spec, request)
    if request.late_chunking and (others := references(sent)):
        raise InputError(Fault("body -> late_chunking", f"It divides texts only; this is {others[0].kind} input."))
    async with opened(state, sent, caller=caller) as inputs:
        call = Embed(
            inputs=inputs,
            task=task_of(spec, request) or spec.default_task,
            instruction=request.instruction or None,
            truncate=state.cuts(request.truncate),
            late_chunking=_parts(request),
            late_chunking_window=request.late_chunking_window,
            output=output_of(spec, request),
            role=_role(spec, request),
            name_tokens=bool(request.return_tokenized_input),
        )
        result = await state.engine.run(spec.id, call, priority=priority, caller=caller, bill=bill)
    return EmbeddingsAnswer(
        model=state.answering(request.model),
        made=await cut(result, request.dimensions, normalized=request.normalized is not False),
        encodings=list(dict.fromkeys(request.embedding_type)),
        counts_output=spec.counts_output,
    )


@router.post(
    "/v1/embeddings",
    summary="Embeddings",
    tags=["Search Foundation Models"],
    openapi_extra=request_body(EmbeddingsRequest),
    responses=responses(EmbeddingResponse),
)
async def embeddings(request: Request) -> Response:
    """Turn inputs into vectors, one per input and of a PDF one per page, in their order."""
    return await answer_embeddings(request, await read_body(request, EmbeddingsRequest))


async def answer_embeddings(request: Request, asked: EmbeddingsRequest) -> Response:
    """Run the verb while the client waits, and write what it answers."""
    answer = await while_awaited(request, embed(state_of(request), asked))
    request.state.log = {"model": answer.model, "inputs": len(asked.input), "tokens": answer.made.n_tokens}
    return written(await write(answer), answer.made.n_truncated)


def as_named(state: State, request: R) -> R:
    """The request with the task that its model's name brings, where it names none itself."""
    task = state.task_of_alias(request.model)
    return request.model_copy(update={"task": task}) if task and request.task is None else request


def _parts(request: EmbeddingsRequest) -> Literal["inputs", "sentences"] | None:
    """What late chunking gives a vector to: of a list each input, since callers put theirs beside ours."""
    if not request.late_chunking:
        return None
    return "sentences" if isinstance(request.input, Alone) else "inputs"


def output_of(spec: ModelSpec, request: EmbeddingsRequest) -> Output:
    """What each input becomes: what was asked for, else what the model does first."""
    if request.return_multivector:
        return "multi"
    return "sparse" if request.return_sparse else spec.outputs[0]


def _role(spec: ModelSpec, request: EmbeddingsRequest) -> Role:
    """The side of the search: `input_type`, else what `task` says to a sparse model; ColBERT models have no task."""
    side = request.input_type
    if side is None and output_of(spec, request) == "sparse":
        side = (task_of(spec, request) or "").rpartition(".")[2]
    return "query" if side == "query" else "document"


def task_of(spec: ModelSpec, request: EmbeddingsRequest) -> str | None:
    """The task that is meant: an older name is completed by `prompt_name`, as a query where that is left out."""
    if (task := request.task) in spec.bare_tasks:
        return f"{task}.{request.prompt_name or 'query'}"
    return None if task is None else spec.task_synonyms.get(task, task)


def check(state: State, spec: ModelSpec, request: EmbeddingsRequest) -> None:
    """Refuse what the catalogue says that this model cannot do.

    Raises:
        InputError: naming the field and the way out.
    """
    faults = [
        *_check_task(spec, request),
        *_check_instruction(state, spec, request),
        *_check_dimensions(spec, request),
        *_check_late_chunking(spec, request),
        *_check_output(spec, request),
    ]
    if faults:
        raise InputError(*faults)


def _check_task(spec: ModelSpec, request: EmbeddingsRequest) -> list[Fault]:
    task, prompt = task_of(spec, request), request.prompt_name
    if spec.bare_tasks and prompt is not None:
        if prompt not in ("query", "passage"):
            return [Fault("body -> prompt_name", "Input should be 'query' or 'passage'.", "enum", echo(prompt))]
        if task is not None and "." in task and not task.endswith(f".{prompt}"):
            return [Fault("body -> prompt_name", f"It contradicts the task '{echo(task)}'; leave one of them out.")]
    if spec.tasks and task is not None and task not in spec.tasks:
        listed = ", ".join(f"'{task}'" for task in spec.tasks)
        return [Fault("body -> task", f"Input should be {listed}.", "enum", echo(request.task))]
    return []


def _check_instruction(state: State, spec: ModelSpec, request: EmbeddingsRequest) -> list[Fault]:
    if not request.instruction:
        return []
    if not spec.instruct:
        able = state.able(lambda other: other.instruct)
        message = f"Model '{spec.id}' follows no instructions. Models served here that do: {able}."
        return [Fault("body -> instruction", message)]
    task = spec.tasks.get(task_of(spec, request) or "")
    if task is not None and not task.prompt:
        message = f"Texts of task '{request.task}' are read without an instruction: leave one of the two out."
        return [Fault("body -> instruction", message)]
    return []


def _check_dimensions(spec: ModelSpec, request: EmbeddingsRequest) -> list[Fault]:
    """What is wrong with the length of what the model makes first; of anything else `_check_output` says it."""
    dimensions = request.dimensions
    output = output_of(spec, request)
    if dimensions is None or output != spec.outputs[0] or output == "sparse":
        return []
    if dimensions > spec.dim:
        message = f"Input should be less than or equal to {spec.dim}"
        return [Fault("body -> dimensions", message, "less_than_equal", dimensions)]
    if spec.dims and dimensions not in spec.dims:
        listed = ", ".join(map(str, spec.dims))
        return [Fault("body -> dimensions", f"Input should be one of {listed}.", "enum", dimensions)]
    if dimensions < (least := spec.shortest_dim or spec.dim):
        why = f"Vectors of '{spec.id}' cannot be cut: ask for {spec.dim} or leave it out."
        message = why if least == spec.dim else f"Input should be greater than or equal to {least}"
        return [Fault("body -> dimensions", message, "greater_than_equal", dimensions)]
    return []


def _check_late_chunking(spec: ModelSpec, request: EmbeddingsRequest) -> list[Fault]:
    if request.late_chunking and not spec.late_chunking:
        why = spec.refusals.get("late_chunking", "its vectors are not pooled over parts of a text")
        return [Fault("body -> late_chunking", f"Model '{spec.id}' does not support late_chunking: {why}.")]
    if spec.late_chunking and request.late_chunking_window is not None and not request.late_chunking:
        return [Fault("body -> late_chunking_window", "It goes with 'late_chunking: true' only.")]
    if request.late_chunking and output_of(spec, request) == "multi":
        return [Fault("body -> late_chunking", "It does not go with return_multivector: ask for one of them.")]
    return []


_GIVES: dict[Output, str] = {
    "dense": "one vector per input",
    "multi": "one vector per token",
    "sparse": "a weight per token",
}


def _check_output(spec: ModelSpec, request: EmbeddingsRequest) -> list[Fault]:
    """What is wrong with the fields that say what an input becomes, and with those that do not go with it."""
    output, faults = output_of(spec, request), []
    able = " or ".join(_GIVES[each] for each in spec.outputs)
    if request.return_multivector and request.return_sparse:
        faults.append(Fault("body -> return_sparse", "It does not go with return_multivector: ask for one of them."))
    elif output not in spec.outputs:
        field = "return_multivector" if request.return_multivector else "return_sparse"
        faults.append(Fault(f"body -> {field}", f"Model '{spec.id}' gives {able}, not {_GIVES[output]}."))
        return faults
    if request.return_tokenized_input and output != "multi":
        faults.append(Fault("body -> return_tokenized_input", "It requires return_multivector: true."))
    if request.dimensions is not None and (output == "sparse" or output != spec.outputs[0]):
        why = f"It cannot be used with {_GIVES[output]}; leave it out."
        faults.append(Fault("body -> dimensions", why, "value_error", request.dimensions))
    if output != "dense" and request.input_type not in (None, *get_args(Role)):
        listed = " or ".join(f"'{role}'" for role in get_args(Role))
        faults.append(Fault("body -> input_type", f"Input should be {listed}.", "enum", echo(request.input_type)))
    if output == "sparse" and (other := sorted({"binary", "ubinary"}.intersection(request.embedding_type))):
        why = "Weights of tokens have no bits: leave it out."
        faults.append(Fault("body -> embedding_type", why, "enum", other[0]))
    return faults
