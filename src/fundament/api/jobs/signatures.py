"""What is signed: links that download a job's files without a key, and webhooks."""

import base64
import hmac
import re
from datetime import UTC, datetime
from hashlib import sha256

from fastapi import Request

from fundament.api.jobs.downloads import Kind
from fundament.api.state import State
from fundament.depot import secret
from fundament.store.jobs import Job

_SECONDS = re.compile("[0-9]{1,12}")  # since 1970, to the year 33658


async def signed_url(state: State, job: Job, kind: Kind) -> str:
    """An address that gives a job's files without a key, until the job expires."""
    expires = int(job.expires_at.timestamp())
    signature = await _signature(state, job.id, kind, expires)
    return f"{job.asked.get('base_url', '')}/v1/batch/{job.id}/{kind}?expires={expires}&signature={signature}"


async def is_signed(state: State, request: Request, job_id: str, kind: Kind) -> bool:
    """Whether a request carries our signature for these files, and in time."""
    expires, given = request.query_params.get("expires", ""), request.query_params.get("signature", "")
    if not _SECONDS.fullmatch(expires) or int(expires) < datetime.now(UTC).timestamp():
        return False
    return hmac.compare_digest(given.encode(), (await _signature(state, job_id, kind, int(expires))).encode())


async def _signature(state: State, job_id: str, kind: Kind, expires: int) -> str:
    return hmac.digest(await secret(state.depot, "links"), f"{job_id}/{kind}/{expires}".encode(), sha256).hex()


async def message_secret(state: State) -> bytes:
    """What signs webhooks."""
    if given := state.settings.webhook_secret:
        return base64.b64decode(given.removeprefix("whsec_"))
    return await secret(state.depot, "webhook")
