"""`POST /v1/chat/completions` (experimental): a conversation in, its next message out, whole or as it is written."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, StringConstraints, WithJsonSchema

from fundament.api.body import Body, ModelName, echo, read_body
from fundament.api.events import DONE, EventStream, event
from fundament.api.inputs import Part, Reference
from fundament.api.media import opened
from fundament.api.presence import while_awaited
from fundament.api.schemas import request_body, responses
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.catalog import ModelSpec
from fundament.core import ChatRole, Delta, Generate, Group, Input, Message
from fundament.errors import Fault, InputError

router = APIRouter()

_ROLES: dict[str, ChatRole] = {role: role for role in get_args(ChatRole)} | {"developer": "system"}
_MOST_MESSAGES, _MOST_STOPS = 1_000, 4


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A message as it was sent."""

    role: ChatRole
    parts: tuple[Part, ...]


def read_messages(value: Any) -> list[SentMessage]:
    """The messages of a request.

    Raises:
        InputError: something that is no message, named by its place.
    """
    if not isinstance(value, list) or not value:
        raise InputError(Fault("body -> messages", "Input should be a list of messages.", "list_type", echo(value)))
    if len(value) > _MOST_MESSAGES:
        message = f"List should have at most {_MOST_MESSAGES} items, not {len(value)}."
        raise InputError(Fault("body -> messages", message, "too_long", echo(value)))
    return [_read_message(each, f"body -> messages -> {place}") for place, each in enumerate(value)]


def _read_message(value: Any, origin: str) -> SentMessage:
    if not isinstance(value, dict):
        message = 'A message should be an object like {"role": "user", "content": "…"}.'
        raise InputError(Fault(origin, message, "dict_type", echo(value)))
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        listed = ", ".join(f"'{name}'" for name in _ROLES)
        raise InputError(Fault(f"{origin} -> role", f"Input should be {listed}.", "enum", echo(role)))
    if value.get("tool_calls"):
        raise InputError(Fault(f"{origin} -> tool_calls", "Tools are not served; leave it out.", "value_error"))
    if content is None or isinstance(content, str):
        return SentMessage(_ROLES[role], (content,) if content else ())
    if not isinstance(content, list):
        message = "Input should be a string or a list of parts."
        raise InputError(Fault(f"{origin} -> content", message, "string_type", echo(content)))
    places = enumerate(content)
    return SentMessage(_ROLES[role], tuple(_read_part(part, f"{origin} -> content -> {i}") for i, part in places))


def _read_part(value: Any, origin: str) -> Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and isinstance(text := value.get("text"), str):
        return text
    if kind == "image_url":
        named = value.get("image_url")
        url = named.get("url") if isinstance(named, dict) else named
        if isinstance(url, str):
            return Reference("image", url, f"{origin} -> image_url")
    message = 'A part should be {"type": "text", "text": "…"} or {"type": "image_url", "image_url": {"url": "…"}}.'
    raise InputError(Fault(origin, message, "value_error", echo(value)))


def _as_list(value: Any) -> Any:
    return [] if value is None else value if isinstance(value, list) else [value]


_PART = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "image_url"]},
        "text": {"type": "string"},
        "image_url": {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}},
    },
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": _MOST_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"enum": list(_ROLES)}, "content": _CONTENT},
    },
    "description": "What was said so far: texts, and images as URL or data URI.",
}
_STOP = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 256},
        {"type": "array", "maxItems": _MOST_STOPS, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
        {"type": "null"},
    ]
}


class ChatRequest(Body):
    """Fields that are not named here are ignored; those that would change the answer and are not served are refused."""

    model: ModelName = Field(description="The model's id, short or long.", examples=["jina-vlm"])
    messages: Annotated[list[Any], BeforeValidator(read_messages), WithJsonSchema(_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None,
        validation_alias=AliasChoices("max_tokens", "max_completion_tokens"),
        description="Most tokens to write; 256 where it is left out. Also read as `max_completion_tokens`.",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, or left out, takes the likeliest token each time; the higher, the more others are drawn."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="With a temperature: draw from the likeliest tokens that together have this probability."
    )
    stop: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
        Field(max_length=_MOST_STOPS),
        BeforeValidator(_as_list),
        WithJsonSchema(_STOP),
    ] = Field([], description="Texts before the first of which the answer ends.")
    seed: int | None = Field(None, description="With a temperature: draws the same tokens again.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is written.")
    stream_options: dict[str, Any] | None = Field(
        None, description="With `stream`: `include_usage` sends the numbers of tokens in one more event, the last."
    )
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="One answer.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not served: 0.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not served: 0.")
    logprobs: bool | None = Field(None, description="Not served: false.")
    logit_bias: dict[str, Any] | None = Field(None, description="Not served: empty.")
    response_format: dict[str, Any] | None = Field(None, description='Not served but `{"type": "text"}`.')
    tools: list[Any] | None = Field(None, description="Not served: empty.")
    tool_choice: str | dict[str, Any] | None = Field(None, description="Not served but `none` and `auto`.")
    functions: list[Any] | None = Field(None, description="Not served: empty.")
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description='Not served but `["text"]`.'
    )
    audio: dict[str, Any] | None = Field(None, description="Not served.")
    top_logprobs: int | None = Field(None, description="Not served: 0.")


class ChatMessage(BaseModel):
    """What the model wrote."""

    role: str
    content: str


class ChatChoice(BaseModel):
    """The answer, and why it ends: `stop` or `length`."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: str


class ChatUsage(BaseModel):
    """Tokens read, those of images included, and tokens written, the one that ended the answer included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """A whole answer. With `stream` the body is `text/event-stream`: chunks of OpenAI's form, then `[DONE]`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


def check(state: State, spec: ModelSpec, request: ChatRequest) -> None:
    """Refuse models that do not chat and fields that are not served.

    Raises:
        InputError: naming each field.
    """
    if spec.kind != "chat":
        able = state.able(lambda other: other.kind == "chat")
        message = f"Model '{spec.id}' does not chat. Models served here that do: {able}."
        raise InputError(Fault("body -> model", message))
    told = request.response_format or {"type": "text"}
    refused = {
        "logprobs": request.logprobs,
        "logit_bias": request.logit_bias,
        "tools": request.tools,
        "tool_choice": request.tool_choice not in (None, "none", "auto"),
        "functions": request.functions,
        "modalities": request.modalities not in (None, ["text"]),
        "audio": request.audio,
        "top_logprobs": request.top_logprobs,
        "response_format": told.get("type") != "text",
    }
    faults = [Fault(f"body -> {name}", "It is not served; leave it out.") for name, asked in refused.items() if asked]
    if not isinstance((request.stream_options or {}).get("include_usage"), bool | None):
        faults.append(Fault("body -> stream_options -> include_usage", "Input should be a valid boolean", "bool_type"))
    if faults:
        raise InputError(*faults)


async def chat(state: State, request: ChatRequest) -> AsyncGenerator[Delta, None]:
    """The answer, piece by piece; close it where it is not read to its end.

    Raises:
        FundamentError: a model that is not served or does not chat, or a conversation that cannot be read.
    """
    spec = state.find(request.model)
    check(state, spec, request)
    async with AsyncExitStack() as files:
        sent = [message.parts for message in request.messages]
        groups = await files.enter_async_context(opened(state, sent, "body -> messages"))
        deltas = state.engine.generate(spec.id, _call(request, groups))
        del request, sent, groups  # an answer may take long, and its files are read before it begins
        async with aclosing(deltas):
            async for delta in deltas:
                await files.aclose()
                yield delta


def _call(request: ChatRequest, groups: Sequence[Input]) -> Generate:
    each = zip(request.messages, cast("Sequence[Group]", groups), strict=True)
    return Generate(
        messages=[Message(message.role, group.parts) for message, group in each],
        max_tokens=request.max_tokens,
        temperature=request.temperature or 0.0,
        top_p=request.top_p or 1.0,
        stop=request.stop,
        seed=request.seed,
    )


@router.post(
    "/v1/chat/completions",
    summary="Chat Completions (Experimental)",
    tags=["Search Foundation Models"],
    openapi_extra=request_body(ChatRequest),
    responses=responses(ChatCompletion),
)
async def chat_completions(request: Request) -> Response:
    """Write the next message of a conversation."""
    asked = await read_body(request, ChatRequest)
    state = state_of(request)
    head = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion.chunk" if asked.stream else "chat.completion",
        "created": int(time.time()),
        "model": state.answering(asked.model),
    }
    request.state.log = log = {"model": head["model"]}
    deltas = chat(state, asked)
    try:
        if asked.stream:
            # The first piece is waited for, so that what is refused has its own status.
            first = await while_awaited(request, _first(deltas))
            usage = bool((asked.stream_options or {}).get("include_usage"))
            return EventStream(request, deltas, _events(head, first, deltas, log, usage=usage))
        text, last = await while_awaited(request, _whole(deltas))
    except BaseException:
        await deltas.aclose()
        raise
    await deltas.aclose()
    log["tokens"] = last.n_prompt + last.n_written
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish}
    return answer({**head, "choices": [choice], "usage": usage_of(last)})


def usage_of(last: Delta) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": last.n_prompt,
        "completion_tokens": last.n_written,
        "total_tokens": last.n_prompt + last.n_written,
    }


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)


async def _whole(deltas: AsyncGenerator[Delta, None]) -> tuple[str, Delta]:
    read = [delta async for delta in deltas]
    return "".join(delta.text for delta in read), read[-1]


async def _events(
    head: dict[str, Any], first: Delta, deltas: AsyncGenerator[Delta, None], log: dict[str, Any], *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; the request's log line learns how many tokens it had."""
    more: dict[str, Any] = {"usage": None} if usage else {}

    def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    last = first
    if first.text:
        yield chunk({"content": first.text})
    async for last in deltas:
        if last.text:
            yield chunk({"content": last.text})
    log["tokens"] = last.n_prompt + last.n_written
    yield chunk({}, last.finish)
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(last)})
    yield DONE
