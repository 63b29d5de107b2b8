"""The app's OpenAPI document, with what FastAPI does not know: who needs a key, and what bodies refer to."""

from typing import Any

from fastapi import FastAPI

from fundament.api.auth import ADMIN_BELOW, is_open

_BEARER = "HTTPBearer"  # as the public specification calls it


def install(app: FastAPI, *, auth: bool) -> None:
    """Complete the document when it is first asked for.

    Args:
        app: whose routes are documented.
        auth: whether the server asks for keys.
    """
    plain = app.openapi

    def completed() -> dict[str, Any]:
        return app.openapi_schema or complete(plain(), auth=auth)

    app.openapi = completed  # type: ignore[method-assign]


def complete(document: dict[str, Any], *, auth: bool) -> dict[str, Any]:
    """Add the keys, and move what request bodies refer to where the references point.

    Args:
        document: FastAPI's, which is changed.
        auth: whether the server asks for keys; a key is optional where it does not, except for managing keys.
    """
    components = document["components"]
    components["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if not is_open(path):
                needed = auth or path.startswith(ADMIN_BELOW)
                operation["security"] = [{_BEARER: []}] if needed else [{_BEARER: []}, {}]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                components["schemas"] |= content["schema"].pop("$defs", {})
    return document
