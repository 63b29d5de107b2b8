"""A worker that dies over the text `die`, else works until a job has ended: `python -m tests.faults.deadly DIR JOB`."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from fundament.core import Embed
from tests.inprocess import running, work_until

DEATH = 9


class Deadly:
    """An engine that takes its process with it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def run(self, model: str, call: Embed, **how: Any) -> Any:
        if "die" in call.texts:
            await asyncio.sleep(0.05)  # others have begun by then
            os._exit(DEATH)
        return await self.engine.run(model, call, **how)


def main(folder: Path, job: str) -> None:
    """Work until the job has ended."""
    with running(folder, worker=False, preload=False, job_lease_seconds=0.2) as api:
        parts = api.app.state.parts
        parts.engine = Deadly(parts.engine)

        async def ended() -> bool:
            found = (await api.client.get(f"/v1/batch/{job}")).json()
            return found["status"] not in ("pending", "processing")

        work_until(api, ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
