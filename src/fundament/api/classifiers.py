"""`GET` and `POST /v1/classifiers`, `DELETE /v1/classifiers/{id}`: the caller's trained classifiers."""

from datetime import datetime
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.api.auth import owner
from fundament.api.ids import checked_id
from fundament.api.schemas import responses
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.errors import BusyError, NotFoundError
from fundament.store import classifiers as table
from fundament.store.classifiers import Summary

router = APIRouter(tags=["Classification"])

NOBODY = ""  # who owns what callers without a key make
_ID_LENGTH = 36


class ClassifierSummary(BaseModel):
    """A trained classifier."""

    classifier_id: UUID
    user_id: UUID
    model: str
    labels: list[str]
    access: str
    updated_number: int
    used_number: int
    created_at: datetime
    updated_at: datetime
    used_at: datetime | None
    is_active: bool
    is_latest: bool
    metadata_: dict[str, Any]


class Deleted(BaseModel):
    """What is gone."""

    classifier_id: UUID
    object: str
    deleted: bool


def known_id(classifier_id: str) -> str:
    """A classifier's id as the store writes it.

    Raises:
        NotFoundError: it is the id of no classifier.
    """
    return checked_id(classifier_id, not_found).lower()


def not_found(classifier_id: str) -> NotFoundError:
    """The same words for a classifier that is not there and for one that is somebody else's."""
    return NotFoundError(f"Classifier '{classifier_id[:_ID_LENGTH]}' not found or access denied.")


def busy(classifier_id: str) -> BusyError:
    """Somebody else changes this classifier."""
    return BusyError(f"Classifier '{classifier_id}' is currently being modified. Try again when that is done.")


async def take(connection: AsyncConnection, classifier_id: str, caller: str | None, mark: str) -> Summary:
    """Put a mark on a classifier of the caller's, or with None of anybody's, against all others who would change it.

    Raises:
        NotFoundError: the caller has no such classifier.
        BusyError: somebody else's mark is on it.
    """
    if (known := await table.hold(connection, classifier_id, caller, mark)) is not None:
        return known
    there = await table.owns(connection, classifier_id, caller)
    raise busy(classifier_id) if there else not_found(classifier_id)


async def delete(state: State, classifier_id: str, caller: str | None) -> str:
    """Delete a classifier of the caller's, or with None anybody's; one that is asked at that moment still answers.

    Raises:
        NotFoundError: the caller has no such classifier.
        BusyError: it is being updated.
    """
    classifier_id = known_id(classifier_id)
    async with state.store.write() as connection:
        await take(connection, classifier_id, caller, str(uuid4()))
        await table.remove(connection, classifier_id)
    return classifier_id


def describe(summary: Summary) -> dict[str, Any]:
    """A classifier in the fields of the 2026 specification."""
    return {
        "classifier_id": summary.id,
        "user_id": str(_user_id(summary.owner)),
        "model": summary.model,
        "labels": summary.labels,
        "access": summary.access,
        "updated_number": summary.updated_number,
        "used_number": summary.used_number,
        "created_at": summary.created_at,
        "updated_at": summary.updated_at,
        "used_at": summary.used_at,
        "is_active": True,
        "is_latest": True,
        "metadata_": {"num_samples": summary.n_examples},
    }


def _user_id(owner: str) -> UUID:
    """A key as the UUID that the specification wants; all zeros for nobody's."""
    return uuid5(NAMESPACE_URL, f"urn:fundament:key:{owner}") if owner != NOBODY else UUID(int=0)


_LIST: dict[str, Any] = {
    "summary": "List classifiers",
    "responses": responses(list[ClassifierSummary], errors=(401, 429, 500, 503)),
}


@router.get("/v1/classifiers", **_LIST)
@router.post("/v1/classifiers", **_LIST)
async def list_classifiers(request: Request) -> Response:
    """The classifiers that the caller has trained, the oldest first."""
    state = state_of(request)
    await state.accounts.ledger.write()  # what was asked a moment ago shows
    async with state.store.read() as connection:
        found = await table.listed(connection, owner(request))
    return answer([describe(summary) for summary in found])


@router.delete(
    "/v1/classifiers/{classifier_id:path}",
    summary="Delete a classifier",
    responses=responses(Deleted, errors=(401, 404, 409, 429, 500, 503)),
)
async def delete_classifier(request: Request, classifier_id: str) -> Response:
    """Delete one of the caller's classifiers and the examples that it learned from."""
    deleted = await delete(state_of(request), classifier_id, owner(request))
    return answer({"classifier_id": deleted, "object": "classifier", "deleted": True})
