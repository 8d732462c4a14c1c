"""Answers that are no success, as the OpenAPI description tells them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Answers = dict[int | str, dict[str, Any]]

_PLACE = "#/components/schemas/{model}"
_MEANINGS = {
    400: "The request can't be read, or not be done as it is",
    401: "The API key is missing or wrong",
    403: "The API key may not do this",
    404: "There is no such thing, or the API key may not see it",
    409: "A name is taken, or is in use",
    413: "The body is too large",
    422: "A mix can't be made, or would lose too much",
    429: "There are more requests than may be: try again after `Retry-After` seconds",
    503: "No engine answers, or none has a place: try again after `Retry-After` seconds",
}


class Said(BaseModel):
    """What was wrong, of which kind, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    """An error in OpenAI's shape."""

    error: Said


def errors(*statuses: int) -> Answers:
    """Those in OpenAI's shape with these statuses: JSON, whatever a route answers else."""
    content = {"application/json": {"schema": {"$ref": _PLACE.format(model=Error.__name__)}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


EVERYWHERE = errors(401, 403, 429, 503)


def whole_description(described: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's, with the shape of errors, and without the 422 that it says of each route by itself: what can't be read
    is 400 here."""
    for how in described.get("paths", {}).values():
        for operation in how.values():
            said = operation.get("responses", {})
            if "HTTPValidationError" in str(said.get("422", "")):
                del said["422"]
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = Error.model_json_schema(ref_template=_PLACE)
    schemas |= {**error.pop("$defs"), Error.__name__: error}
    return described
