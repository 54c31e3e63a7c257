"""Every HTTP error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from .request import RefusalCode, RequestRefused

# refusal -> (status, type)
REFUSALS: dict[RefusalCode, tuple[int, str]] = {
    "invalid": (400, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "busy": (429, "rate_limit_error"),
    "internal": (500, "server_error"),
    "unavailable": (503, "server_error"),
    "deadline": (504, "server_error"),
}
_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """A request that HTTP itself refuses; `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        type_: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = error_body(message, type_, param, code)


def error_body(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def refusal_body(refused: RequestRefused) -> dict[str, Any]:
    return error_body(refused.message, REFUSALS[refused.code][1], None, refused.code)


def internal_body() -> dict[str, Any]:
    """Says nothing of the cause: that stands in the log."""
    return error_body("the server failed on this request; its log says why", "server_error", None, "internal")


def schema_error(error: ValidationError) -> ApiError:
    """The first complaint of pydantic, in one line that names the field and the value."""
    errors = error.errors(include_url=False)
    # of a union every branch complains: the one that came deepest is the one that was meant
    first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    # pydantic names the branch of a union as if it were a field
    names = [str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
    param = ".".join(names) or None
    if first["type"] == "missing":
        return ApiError(f"{param} is missing: it must be there", param)
    return ApiError(f"{param or 'the body'} is {reprlib.repr(first['input'])}: {first['msg'].lower()}", param)


def install(app: FastAPI) -> None:
    """Gives every way to fail its answer."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestRefused)
        wait = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        return JSONResponse(refusal_body(error), REFUSALS[error.code][0], wait)

    async def wrong(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, "invalid_request_error", None, _BY_STATUS.get(error.status_code))
        return JSONResponse(body, error.status_code, error.headers)

    async def failed(_: Request, error: Exception) -> JSONResponse:  # the server logs the traceback itself
        return JSONResponse(internal_body(), 500)

    app.add_exception_handler(RequestRefused, refused)
    app.add_exception_handler(ApiError, wrong)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, failed)
