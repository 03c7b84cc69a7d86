"""What the service answers: the bodies, and the one door through which every error leaves."""

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fieldmark.errors import FieldmarkError, ImageError

SHOWN_CHARACTERS = 80  # of what a client sent, when an error repeats it


class RequestError(FieldmarkError):
    """A request that cannot be answered as it is, or not now."""

    reason = ""  # of a refusal, in one of few words: the metrics name it


class BadQuery(RequestError):
    """A query parameter that does not exist, is given twice, or is out of range."""

    code = "bad_query"
    http_status = 400


class BadBody(RequestError):
    """A form or JSON that cannot be read, or holds no image or too many."""

    code = "bad_body"
    http_status = 400


class NoSuchModel(RequestError):
    """A model that is not served here."""

    code = "not_found"
    http_status = 404


class Busy(RequestError):
    """More requests are waiting than the service lets wait."""

    code = "busy"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: int, reason: str) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class Late(RequestError):
    """The deadline passed before there was an answer."""

    code = reason = "late"
    http_status = 504

    @classmethod
    def before_the_model(cls, waited_s: float) -> "Late":
        """Return the error of an image that was not computed."""
        return cls(
            f"the answer must come before its deadline. It waited {waited_s:.3g} s and was not "
            "computed. Retry later, or allow more time."
        )


class NotReady(RequestError):
    """The model is still being loaded and checked."""

    code = reason = "not_ready"
    http_status = 503
    retry_after_s = 1


class PredictionBody(BaseModel):
    """One class and its probability."""

    class_name: str
    description: str | None = Field(None, description="Absent if the package has none.")
    probability: float = Field(ge=0, le=1)


class ExplanationBody(BaseModel):
    """What the likeliest class rests on."""

    class_name: str
    png: str = Field(
        description="Base64 of a picture: the image as the model saw it, in grey, red where it "
        "spoke for the class and blue where against it."
    )


class ClassifyBody(BaseModel):
    """The answer for one image."""

    model: str = Field(description="Id of the package: the SHA-256 of its manifest.")
    preprocessing: str = Field(description="SHA-256 of the preprocessing's specification.")
    predictions: list[PredictionBody] = Field(description="The likeliest first.")
    explanation: ExplanationBody | None = None


class NotAlive(RequestError):
    """The model will not answer any more."""

    code = reason = "not_alive"
    http_status = 503
    retry_after_s = 1  # of another service behind the same address


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="For machines: it does not change.")
    message: str = Field(description="For people: what must be, what was found, what to do.")


class ItemBody(BaseModel):
    """The answer for one of several images."""

    index: int = Field(description="Its place in the request, from 0.")
    name: str | None = Field(None, description="The file's name, if the request gave one.")
    status: int = Field(description="As if it had come alone: 200, 413, 422, 500 or 504.")
    predictions: list[PredictionBody] | None = None
    explanation: ExplanationBody | None = None
    error: ErrorDetail | None = None


class BatchBody(BaseModel):
    """The answer for several images: one item for each, in their order."""

    model: str = Field(description="Id of the package: the SHA-256 of its manifest.")
    preprocessing: str = Field(description="SHA-256 of the preprocessing's specification.")
    results: list[ItemBody]


class AliveBody(BaseModel):
    """The process answers."""

    status: str = "alive"


class ReadyBody(BaseModel):
    """The model is loaded and passed its golden samples."""

    status: str = "ready"
    model: str
    preprocessing: str


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


class ProtocolError(BaseModel):
    """The shape of every error under /v2."""

    error: str = Field(description="What must be, what was found, what to do.")


INTERNAL = ErrorDetail(code="internal", message="the service failed. The cause is in its log.")


def to_error(error: Exception) -> tuple[int, ErrorDetail]:
    """Return the status of an error and what a client may know of it."""
    if isinstance(error, ImageError | RequestError):
        return error.http_status, ErrorDetail(code=error.code, message=str(error))
    return 500, INTERNAL


def shown(value: object) -> str:
    """Return what a client sent as short printable ASCII in quotes."""
    return ascii(str(value)[:SHOWN_CHARACTERS])


def add_error_handlers(app: FastAPI) -> None:
    """Make the errors that `app` knows an ErrorBody, without paths of this machine."""

    @app.exception_handler(ImageError)
    @app.exception_handler(RequestError)
    async def explain(request: Request, error: FieldmarkError) -> JSONResponse:
        return error_reply(request, error)

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        message = f"{first['loc'][-1]}: {first['msg']}. Got {shown(first.get('input'))}."
        return _reply(request, BadQuery.http_status, BadQuery.code, message)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        path = shown(request.url.path)
        if error.status_code == 404:
            return _reply(
                request, 404, "not_found", f"path {path} does not exist. See /docs.", headers
            )
        if error.status_code == 405:
            message = (
                f"method for {path} must be {headers.get('Allow', 'another')}. "
                f"Got {shown(request.method)}."
            )
            return _reply(request, 405, "method_not_allowed", message, headers)
        return _reply(request, error.status_code, "http_error", str(error.detail), headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return incomplete_reply(request)


def error_reply(
    request: Request, error: FieldmarkError, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return the answer to a request that ends with an error which its client may know."""
    if isinstance(error, Busy | NotReady | NotAlive):
        headers = {"Retry-After": str(error.retry_after_s)} | (headers or {})
    request.scope.setdefault("state", {})["reason"] = getattr(error, "reason", "")
    return _reply(request, error.http_status, error.code, str(error), headers)


def incomplete_reply(request: Request) -> JSONResponse:
    """Return the answer to a request whose client went before its body was there."""
    return _reply(
        request, 400, "client_disconnected", "the body must arrive completely. It did not."
    )


def unexpected_reply(request: Request) -> JSONResponse:
    """Return the answer to a request that failed for a reason which is not the client's to know."""
    return _reply(request, 500, INTERNAL.code, INTERNAL.message)


def error_content(path: str, code: str, message: str) -> dict[str, object]:
    """Return what says an error to a client of `path`; V2 has one text for it."""
    if f"{path}/".startswith("/v2/"):
        return {"error": message}
    return {"error": {"code": code, "message": message}}


def raw_reply(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Return an answer as HTTP/1.1 writes it, for what is answered outside of the app."""
    fields = b"".join(b"%b: %b\r\n" % one for one in headers)
    date = _date(int(time.time()))
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
    return b"%bdate: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (line, date, len(body), fields, body)


@lru_cache(1)
def _date(seconds: int) -> bytes:
    return formatdate(seconds, usegmt=True).encode()


def _reply(
    request: Request,
    status: int,
    code: str,
    message: str,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error in the shape of its protocol."""
    return JSONResponse(error_content(request.scope["path"], code, message), status, headers)
