"""Other people's rerank clients, run in a process of its own: they leave connections open and warn of much.

    python rerank_clients.py CLIENT URL < [{"model": …, "query": …, "documents": […], …}, …]

It prints what the client shows for each request.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

Results = list[tuple[int, float, Any]]
"""Of each result the document's place, its score, and the document as the client shows it."""


def litellm(url: str, model: str, query: str, documents: list[Any], **fields: Any) -> Results:
    import litellm as client

    answer = client.rerank(f"jina_ai/{model}", query, documents, api_base=url, api_key="none", **fields)
    return [(each["index"], each["relevance_score"], each.get("document")) for each in answer.results]


def langchain(url: str, model: str, query: str, documents: list[Any], **fields: Any) -> Results:
    from langchain_community.document_compressors import jina_rerank
    from langchain_core.documents import Document

    jina_rerank.JINA_API_URL = f"{url}/v1/rerank"
    client = jina_rerank.JinaRerank(jina_api_key="none", model=model, **fields)
    sent = [Document(text, metadata={"place": place}) for place, text in enumerate(documents)]
    found = client.compress_documents(sent, query)
    return [(each.metadata["place"], each.metadata["relevance_score"], each.page_content) for each in found]


def cohere(url: str, model: str, query: str, documents: list[Any], **fields: Any) -> Results:
    from cohere import Client

    answer = Client("none", base_url=url).rerank(model=model, query=query, documents=documents, **fields)
    shown = [
        each.document if isinstance(each.document, str | None) else each.document.dict() for each in answer.results
    ]
    return [(each.index, each.relevance_score, one) for each, one in zip(answer.results, shown, strict=True)]


def cohere_v2(url: str, model: str, query: str, documents: list[Any], **fields: Any) -> Results:
    from cohere import ClientV2

    answer = ClientV2("none", base_url=url).rerank(model=model, query=query, documents=documents, **fields)
    return [(each.index, each.relevance_score, getattr(each, "document", None)) for each in answer.results]


CLIENTS: dict[str, Callable[..., Results]] = {
    "litellm": litellm,
    "langchain": langchain,
    "cohere": cohere,
    "cohere_v2": cohere_v2,
}


def answer(name: str, url: str, asked: dict[str, Any]) -> Results | dict[str, str]:
    """What the client shows for one request, or of which error it speaks."""
    try:
        return CLIENTS[name](url, **asked)
    except Exception as error:
        return {"error": str(error)}


if __name__ == "__main__":
    name, url = sys.argv[1:]
    json.dump([answer(name, url, asked) for asked in json.load(sys.stdin)], sys.stdout)
