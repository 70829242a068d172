"""Errors in the shape of OpenAI's API."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

MAX_SHOWN = 60  # characters of a refused value


class APIError(Exception):
    """An error for the client.

    Args:
        status: the HTTP status.
        message: what is wrong; "X is Y; expected Z".
        param: the field of the request that is wrong.
        code: OpenAI's code for programs.
        retry_after: seconds until the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as a reply."""
        return JSONResponse(self.body, self.status, self.headers)


class ClientGone(Exception):
    """The client has closed the connection, so there is nobody to answer."""


def refused_body(error: ValidationError, fields: frozenset[str]) -> APIError:
    """The error for a body that doesn't have the expected fields.

    Args:
        error: pydantic's.
        fields: the names of all fields; others in a location are pydantic's names of types.
    """
    errors = error.errors(include_url=False, include_context=False)  # of a union one error for each of its types
    found = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    kind, location = found["type"], list(found["loc"])
    if kind == "json_invalid":
        return APIError(400, "the body is not valid JSON: " + found["msg"].removeprefix("Invalid JSON: "))
    unknown = location.pop() if kind == "extra_forbidden" else None
    param = ".".join(str(part) for part in location if isinstance(part, int) or part in fields)
    if unknown is not None:
        param = f"{param}.{unknown}" if param else str(unknown)
        return APIError(400, f"{param[:MAX_SHOWN]} is not supported; remove it", param=param, code="unknown_parameter")
    if kind == "missing":
        return APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    expected = found["msg"].removeprefix("Input should be ")
    expected = re.sub(r"^\w+ should have (at \w+ \d+ \w+).*", r"\1", expected)  # "List should have at least 1 item …"
    message = f"{param or 'the body'} is {_shown(found['input'])}; expected {expected}"
    return APIError(400, message, param=param or None, code="invalid_value")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else f"a list of {len(value)}"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
