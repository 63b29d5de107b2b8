"""What `/metrics` shows of batch jobs, and that it shows the rest while the store is gone."""

import re
from pathlib import Path

import httpx
from sqlalchemy.engine import make_url

from tests.inprocess import Api, running, work_until
from tests.relay import relay
from tests.served import MODEL
from tests.servers import database_on


def shown(api: Api, name: str) -> dict[str, float]:
    """The values of one metric, by state."""
    page = api.run(api.client.get("/metrics"))
    assert page.status_code == 200
    return {state: float(value) for state, value in re.findall(rf'^{name}{{state="(\w+)"}} (\S+)$', page.text, re.M)}


def submit(api: Api) -> str:
    body = {"model": MODEL, "input": ["one", "two"]}
    answer: httpx.Response = api.run(api.client.post("/v1/batch/embeddings", json=body))
    return str(answer.json()["batch_id"])


def test_requests_count_under_the_paths_that_are_documented(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, preload=False) as api:
        api.run(api.client.delete("/v1/classifiers/a/b"))
        page = api.run(api.client.get("/metrics")).text
    assert 'fundament_requests_total{path="/v1/classifiers/{classifier_id}",status="404"} 1.0' in page
    assert "_created" not in page


def test_jobs_that_have_not_ended_are_counted(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        assert shown(api, "fundament_jobs") == {"queued": 0, "running": 0}
        job = submit(api)
        assert shown(api, "fundament_jobs") == {"queued": 1, "running": 0}

        async def is_done() -> bool:
            return bool((await api.client.get(f"/v1/batch/{job}")).json()["status"] == "completed")

        work_until(api, is_done)
        assert shown(api, "fundament_jobs") == {"queued": 0, "running": 0}
        assert shown(api, "fundament_job_lines") == {"queued": 0, "running": 0}


def test_the_rest_is_shown_while_the_store_is_gone(postgres_url: str, postgres_template: str, tmp_path: Path) -> None:
    with database_on(postgres_url, like=postgres_template) as url, relay(url) as way:
        port = int(way.url.rpartition(":")[2])
        through = make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        with running(tmp_path, worker=False, preload=False, store_url=through) as api:
            submit(api)
            assert shown(api, "fundament_jobs")["queued"] == 1
            way.cut()
            assert shown(api, "fundament_jobs") == {}
            assert "fundament_requests_total" in api.run(api.client.get("/metrics")).text
            way.mend()
            assert shown(api, "fundament_jobs")["queued"] == 1
