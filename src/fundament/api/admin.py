"""`/v1/admin/…`: keys, everybody's usage, uploads and classifiers, for keys that were made with `--admin`."""

import csv
import io
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
)

from fundament.api.body import Body, echo, read_body
from fundament.api.classifiers import ClassifierSummary, Deleted, delete, describe
from fundament.api.ids import checked_id
from fundament.api.jobs import files as uploads
from fundament.api.jobs.files import FileDeleted, FileObject
from fundament.api.me import KeyInfo, UsageLine, describe_key, describe_usage
from fundament.api.schemas import OF_MANY, OF_ONE, request_body, responses
from fundament.api.state import state_of
from fundament.api.wire import answer
from fundament.errors import Fault, InputError, NotFoundError
from fundament.store import classifiers, files, keys, usage
from fundament.store.keys import LAST_YEAR, MOST_TOKENS, Key

router = APIRouter(prefix="/v1/admin", tags=["Administration"])

_WITH_BODY = (400, 401, 403, 413, 415, 429, 500, 503)


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("Input should be a moment like 2027-01-31T00:00:00Z")
    return value


def _within(at: datetime) -> datetime:
    if at.year > LAST_YEAR:
        raise ValueError(f"Input should be a moment of the year {LAST_YEAR} or before; null is for ever")
    return at


_Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
_Moment = Annotated[AwareDatetime, Strict(False), BeforeValidator(_text), AfterValidator(_within)]


class KeyRequest(Body):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    name: _Name = Field(description="What its owner calls it.", examples=["search"])
    tier: str = Field("free", description="The name of its limits.")
    balance: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = Field(
        None, description="Tokens that it may spend; null counts none."
    )
    admin: bool = Field(False, description="Whether it manages keys and sees everybody's usage.")
    expires_at: _Moment | None = Field(None, description="When it stops, with a time zone.")


class KeyChange(Body):
    """What becomes different about a key; what is left out stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    # What a factory makes is no default to the document: a client that filled it in would be refused.
    name: _Name = Field(default_factory=str, description="What its owner calls it.", examples=["search"])
    tier: str = Field(default_factory=str, description="The name of its limits.", examples=["tier1"])
    expires_at: _Moment | None = Field(None, description="When it stops, with a time zone; null is never.")


class CreditRequest(Body):
    """Tokens for a balance."""

    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[int, Field(gt=0, le=MOST_TOKENS)] = Field(description="How many to add.", examples=[1_000_000])


class NewKey(KeyInfo):
    """A key as it is made: `key` is shown this once."""

    key: str


class KeyList(BaseModel):
    """All keys, the oldest first."""

    object: str
    data: list[KeyInfo]


class UsageList(BaseModel):
    """Usage, by day."""

    object: str
    data: list[UsageLine]


class OwnedClassifier(ClassifierSummary):
    """A trained classifier and the key that made it; null where no key did."""

    key_id: str | None


class OwnedClassifierList(BaseModel):
    """Everybody's classifiers, the oldest first."""

    object: str
    data: list[OwnedClassifier]


class OwnedFile(FileObject):
    """An upload and the key that it is of; null where no key made it."""

    key_id: str | None


class OwnedFileList(BaseModel):
    """Everybody's uploads, the oldest first."""

    object: str
    data: list[OwnedFile]


@router.post(
    "/keys",
    summary="Make a key",
    openapi_extra=request_body(KeyRequest),
    responses=responses(NewKey, errors=_WITH_BODY),
)
async def create_key(request: Request) -> Response:
    """Make a key; the answer is the only place where it is ever shown."""
    asked = await read_body(request, KeyRequest)
    _check(request, tier=asked.tier, expires_at=asked.expires_at)
    async with state_of(request).store.write() as connection:
        key, shown = await keys.create(connection, **asked.model_dump())
    return answer(describe_key(key) | {"key": shown})


@router.get("/keys", summary="List keys", responses=responses(KeyList, errors=OF_MANY))
async def list_keys(request: Request) -> Response:
    """Every key, the oldest first, without its secret."""
    async with state_of(request).store.read() as connection:
        found = await keys.everyone(connection)
    return answer({"object": "list", "data": [describe_key(key) for key in found]})


@router.get("/keys/{key_id}", summary="Get a key", responses=responses(KeyInfo, errors=OF_ONE))
async def get_key(request: Request, key_id: str) -> Response:
    """One key, without its secret."""
    async with state_of(request).store.read() as connection:
        return answer(describe_key(_found(key_id, await keys.get(connection, checked_id(key_id, _not_found)))))


@router.patch(
    "/keys/{key_id}",
    summary="Change a key",
    openapi_extra=request_body(KeyChange),
    responses=responses(KeyInfo, errors=(*_WITH_BODY, 404)),
)
async def change_key(request: Request, key_id: str) -> Response:
    """Give a key another name, tier or end, within a second on every process. One that is revoked stays as it is."""
    asked = (await read_body(request, KeyChange)).model_dump(exclude_unset=True)
    if not asked:
        raise InputError(Fault("body", "Give one of name, tier, expires_at.", "missing"))
    _check(request, tier=asked.get("tier"), expires_at=asked.get("expires_at"))
    async with state_of(request).store.write() as connection:
        changed = await keys.change(connection, checked_id(key_id, _not_found), asked)
    return answer(describe_key(_found(key_id, changed)))


@router.delete("/keys/{key_id}", summary="Revoke a key", responses=responses(KeyInfo, errors=OF_ONE))
async def revoke_key(request: Request, key_id: str) -> Response:
    """Stop a key for good, within a second on every process."""
    async with state_of(request).store.write() as connection:
        return answer(describe_key(_found(key_id, await keys.revoke(connection, checked_id(key_id, _not_found)))))


@router.post("/keys/{key_id}/rotate", summary="Rotate a key", responses=responses(NewKey, errors=OF_ONE))
async def rotate_key(request: Request, key_id: str) -> Response:
    """Give a key a new secret; the old one stops within a second. Its limits, balance and usage stay."""
    async with state_of(request).store.write() as connection:
        rotated = await keys.rotate(connection, checked_id(key_id, _not_found))
    if rotated is None:
        raise _not_found(key_id)
    key, shown = rotated
    return answer(describe_key(key) | {"key": shown})


@router.post(
    "/keys/{key_id}/credit",
    summary="Top up a key",
    openapi_extra=request_body(CreditRequest),
    responses=responses(KeyInfo, errors=(*_WITH_BODY, 404)),
)
async def credit_key(request: Request, key_id: str) -> Response:
    """Add tokens to the balance of a key that has one."""
    asked = await read_body(request, CreditRequest)
    async with state_of(request).store.write() as connection:
        return answer(
            describe_key(_found(key_id, await keys.credit(connection, checked_id(key_id, _not_found), asked.tokens)))
        )


@router.get(
    "/classifiers", summary="List everybody's classifiers", responses=responses(OwnedClassifierList, errors=OF_MANY)
)
async def list_classifiers(request: Request) -> Response:
    """Every classifier, the oldest first, with the key that made it: such stay when their key is revoked."""
    state = state_of(request)
    await state.accounts.ledger.write()  # what was asked a moment ago shows
    async with state.store.read() as connection:
        found = await classifiers.listed(connection, None)
    data = [describe(summary) | {"key_id": summary.owner or None} for summary in found]
    return answer({"object": "list", "data": data})


@router.delete(
    "/classifiers/{classifier_id:path}",
    summary="Delete anybody's classifier",
    responses=responses(Deleted, errors=(*OF_ONE, 409)),
)
async def delete_classifier(request: Request, classifier_id: str) -> Response:
    """Delete a classifier, whoever made it, and the examples that it learned from."""
    deleted = await delete(state_of(request), classifier_id, None)
    return answer({"classifier_id": deleted, "object": "classifier", "deleted": True})


@router.get("/files", summary="List everybody's uploads", responses=responses(OwnedFileList, errors=OF_MANY))
async def list_files(request: Request) -> Response:
    """Every upload, the oldest first, with the key that it is of: such stay when their key is revoked."""
    async with state_of(request).store.read() as connection:
        found = await files.everyone(connection)
    data = [uploads.describe(file) | {"key_id": file.key_id or None} for file in found]
    return answer({"object": "list", "data": data})


@router.delete("/files/{file_id}", summary="Delete anybody's upload", responses=responses(FileDeleted, errors=OF_ONE))
async def delete_file(request: Request, file_id: str) -> Response:
    """Remove an upload, whoever made it; jobs that were made from it go on."""
    await uploads.remove(state_of(request), file_id, None)
    return answer({"id": file_id, "object": "file", "deleted": True})


_USAGE = responses(UsageList, errors=OF_MANY, fields=True)
_USAGE[200]["content"] = {"text/csv": {"schema": {"type": "string"}}}


@router.get(
    "/usage",
    summary="Usage",
    openapi_extra={
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": words, "schema": schema}
            for name, words, schema in (
                ("since", "The first day (UTC).", {"type": "string", "format": "date"}),
                ("until", "The last day (UTC).", {"type": "string", "format": "date"}),
                ("key", "Of this key only.", {"type": "string"}),
                ("format", "How it is written.", {"type": "string", "enum": ["json", "csv"]}),
            )
        ]
    },
    responses=_USAGE,
)
async def get_usage(request: Request) -> Response:
    """Requests and tokens per key, day, model and endpoint."""
    asked = request.query_params
    since, until, key_id = _day(asked.get("since"), "since"), _day(asked.get("until"), "until"), asked.get("key")
    if (form := asked.get("format", "json")) not in ("json", "csv"):
        raise InputError(Fault("query -> format", "Input should be 'json' or 'csv'.", "enum", echo(form)))
    if key_id is not None:
        checked_id(key_id, _not_found)
    async with state_of(request).store.read() as connection:
        rows = describe_usage(await usage.find(connection, key_id=key_id, since=since, until=until))
    if form == "json":
        return answer({"object": "list", "data": rows})
    return Response(usage_csv(rows), media_type="text/csv; charset=utf-8")


def usage_csv(rows: list[dict[str, Any]]) -> str:
    """Usage as a table for spreadsheets, with a line of names."""
    page = io.StringIO()
    writer = csv.DictWriter(page, ("day", "key_id", "model", "endpoint", "requests", "tokens"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return page.getvalue()


def _day(text: str | None, name: str) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        message = "Input should be a day like 2026-11-21."
        raise InputError(Fault(f"query -> {name}", message, "date_parsing", echo(text))) from None


def _check(request: Request, *, tier: str | None, expires_at: datetime | None) -> None:
    """Refuse limits that there are not, and an end that is over."""
    if tier is not None and tier not in (names := state_of(request).settings.tier_names()):
        raise InputError(Fault("body -> tier", f"Input should be one of {', '.join(names)}.", "enum", echo(tier)))
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise InputError(Fault("body -> expires_at", "It lies in the past.", "value_error"))


def _found(key_id: str, key: Key | None) -> Key:
    if key is None:
        raise _not_found(key_id)
    return key


def _not_found(key_id: str) -> NotFoundError:
    return NotFoundError(f"Key '{echo(key_id)}' not found, or not in a state for this. GET /v1/admin/keys lists all.")
