"""Errors as the OpenAI API has them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from moebound.errors import MoeboundError

INVALID_REQUEST = "invalid_request_error"


class ApiError(HTTPException):
    """An answer that is an error. param: the field of the request that is at fault. code: one that
    programs can tell errors apart by."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")


def failed(error: Exception) -> ApiError:
    """What a text came to that could not be generated. Only errors of generation itself say more
    than what they are called: others name files of this machine."""
    if isinstance(error, ApiError):
        return error
    if type(error) is MoeboundError:
        message = str(error)
    else:
        message = f"internal error: {type(error).__name__}; the server's log has more"
    return ApiError(500, message, kind="server_error", code="generation_failed")


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request, and the field that has it."""
    found = error.errors(include_url=False, include_input=False)[0]
    message = str(found["msg"]).removeprefix("Value error, ")
    if param := ".".join(map(str, found["loc"])):
        return bad_request(f"{param}: {message}", param=param)
    return bad_request(message)


def install_handlers(app: FastAPI) -> None:
    """Every error of the app in this form, those of FastAPI itself too."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return failed(error).response()
