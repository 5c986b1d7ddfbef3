"""Pure. `/openapi.json` and `/docs`, made from the table of endpoints. The page loads nothing from
elsewhere.
"""

from __future__ import annotations

import html
from typing import Any

from shared.api_endpoints import ENDPOINTS, RESPONSES_PATH, Endpoint, ErrorFamily, ModelIn


def _body(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request body of which all fields are required."""
    schema = {"type": "object", "properties": fields, "required": [*fields]}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


_MESSAGES = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}
_REQUIRED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _MESSAGES},
    "/v1/completions": {"prompt": _TEXTS},
    RESPONSES_PATH: {"input": _TEXTS},
    "/v1/messages": {"messages": _MESSAGES, "max_tokens": {"type": "integer"}},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    "/v1/embeddings": {"input": _TEXTS},
    "/classify": {"input": _TEXTS},
    "/rerank": {"query": _TEXTS, "documents": _TEXTS},
    "/v1/rerank": {"query": _TEXTS, "documents": _TEXTS},
    "/v2/rerank": {"query": _TEXTS, "documents": _TEXTS},
    "/v1/audio/transcriptions": {"file": {"type": "string", "format": "binary"}},
    "/v1/audio/translations": {"file": {"type": "string", "format": "binary"}},
}
"""The fields that vLLM requires. vLLM documents the others itself."""
_READS = {
    "/v1/models": "The models, adapters and aliases that a request may name.",
    "/v1/models/{model}": "One of them.",
    "/version": "The version of this gateway.",
    "/health": "Whether this process answers.",
    "/ready": "Whether every model can be answered from.",
}
_FILES = {
    "/v1/files": {"get": "The files of this key.", "post": "Keeps a file of requests."},
    "/v1/files/{file_id}": {"get": "One of them.", "delete": "Deletes it."},
    "/v1/files/{file_id}/content": {"get": "Its bytes, in JSON lines."},
    "/v1/batches": {"get": "The batches of this key.", "post": "Answers a file of requests."},
    "/v1/batches/{batch_id}": {"get": "One of them, and how far it is."},
    "/v1/batches/{batch_id}/cancel": {"post": "Ends it; what is answered stays."},
}
_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/files", "post"): _body(
        "multipart/form-data",
        {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    ),
    ("/v1/batches", "post"): _body(
        "application/json",
        {
            "input_file_id": {"type": "string"},
            "endpoint": {"enum": [p for p, e in ENDPOINTS.items() if e.model_in is ModelIn.JSON]},
            "completion_window": {"const": "24h"},
        },
    ),
}
_ANSWERS = {
    "400": "The request cannot be.",
    "401": "The key is missing or wrong.",
    "403": "A page of this origin, or under this name of the host, may not ask.",
    "404": "There is no such model, adapter or response.",
    "405": "The path has other methods.",
    "408": "The request came too slowly.",
    "409": "The first request with this Idempotency-Key still waits.",
    "413": "The body is too large.",
    "415": "The body is in an encoding that is not read.",
    "422": "The adapter cannot be served.",
    "429": "Too many requests.",
    "431": "The headers are too long.",
    "500": "The engine failed.",
    "503": "No worker can take the request now.",
    "504": "The request was not finished in time.",
}


_ANY_JSON: dict[str, Any] = {"application/json": {}}
_BYTES_TOO = frozenset(("/v1/embeddings", "/pooling"))
"""Paths that answer with bytes if `encoding_format` asks for them."""


def _kind(path: str) -> str:
    return "jsonl" if path.endswith("/content") else "json"


def openapi(version: str) -> dict[str, Any]:
    paths: dict[str, Any] = {path: {"post": _post(path, e)} for path, e in ENDPOINTS.items()}
    for path, what in _READS.items():
        paths[path] = {"get": _operation(what, "json", _parameters(path))}
    unready = {"description": "It says which models lack workers.", "content": _ANY_JSON}
    paths["/ready"]["get"]["responses"]["503"] = unready
    kept = f"{RESPONSES_PATH}/{{response_id}}"
    paths[kept] = {"get": _operation("A kept response.", "json", _parameters(kept))}
    cancel = f"{kept}/cancel"
    paths[cancel] = {"post": _operation("Ends it.", "json", _parameters(cancel))}
    for path, methods in _FILES.items():
        paths[path] = {
            method: _operation(what, _kind(path), _parameters(path))
            | _BODIES.get((path, method), {})
            for method, what in methods.items()
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Loraplex", "version": version},
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error(False), "AnthropicError": _error(True)},
        },
    }


def _post(path: str, endpoint: Endpoint) -> dict[str, Any]:
    required = _REQUIRED.get(path, {})
    fields: dict[str, Any] = {"model": {"type": ["string", "null"]}}
    if endpoint.streams:
        fields["stream"] = {"type": ["boolean", "null"]}
    schema = {"type": "object", "properties": fields | required, "required": [*required]}
    kind = "multipart/form-data" if endpoint.model_in is ModelIn.FORM else "application/json"
    operation = _operation(endpoint.what.capitalize() + ".", "json", [], endpoint.errors)
    if endpoint.streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {}
    if path in _BYTES_TOO:
        operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    return operation | {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _operation(
    what: str,
    kind: str,
    parameters: list[dict[str, Any]],
    errors: ErrorFamily = ErrorFamily.OPENAI,
) -> dict[str, Any]:
    name = "AnthropicError" if errors is ErrorFamily.ANTHROPIC else "Error"
    refused = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    answers: dict[str, Any] = {"200": {"description": what, "content": {f"application/{kind}": {}}}}
    answers |= {
        status: {"description": why, "content": refused} for status, why in _ANSWERS.items()
    }
    return {"summary": what, "parameters": parameters, "responses": answers}


def _parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]


def _error(anthropic: bool) -> dict[str, Any]:
    text = {"type": "string"}
    error = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": text,
            "type": text,
            "param": {"type": ["string", "null"]},
            "code": text,
        },
    }
    outer: dict[str, Any] = {"error": error}
    if anthropic:
        outer["type"] = {"const": "error"}
    return {"type": "object", "required": [*outer], "properties": outer}


def docs_page(document: dict[str, Any]) -> str:
    """The same document as a page for readers."""
    rows = [
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{info['title']} API</title>"
        "<style>body{font:16px sans-serif;margin:2em}td{padding:.2em 1em .2em 0}</style>"
        f"<h1>{info['title']} {html.escape(info['version'])}</h1>"
        '<p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<table>{''.join(rows)}</table></html>"
    )
