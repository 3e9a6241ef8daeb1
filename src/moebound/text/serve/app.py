"""The routes. Everything that takes time happens in another thread: the worker's, or a helper."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from moebound.errors import BackendUnavailable
from moebound.text.serve.answers import CLIENT_GONE, Events, Format, Kind, Stream, Whole
from moebound.text.serve.bodies import Bodies, parse, with_body_limit
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import Engine
from moebound.text.serve.errors import ApiError, install_handlers
from moebound.text.serve.guard import Guard
from moebound.text.serve.metrics import exposition
from moebound.text.serve.page import Page
from moebound.text.serve.prompts import Prompts
from moebound.text.serve.schema import ChatRequest, CompletionRequest
from moebound.text.serve.worker import Job, Worker
from moebound.text.together import Text

R = TypeVar("R", ChatRequest, CompletionRequest)

LAST_PASS_S = 60.0
"""What a forward pass that was running at shutdown is given to end."""


def create_app(
    engine: Engine,
    config: ServeConfig,
    worker: Worker,
    *,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application, for any ASGI server. hosts: see `Guard`. The worker is started and ended
    with the application's lifespan; the engine is left open."""
    config = with_body_limit(config, engine.model)
    bodies = Bodies(config.receive_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()
        worker.cancel_running()
        bodies.close()
        await asyncio.to_thread(worker.join, LAST_PASS_S)

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(
        title="moebound", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    prompts = Prompts(engine, config)
    page = Page()
    app.add_middleware(
        Guard,
        page=page,
        api_key=config.api_key,
        hosts=hosts,
        max_body_bytes=config.max_body_bytes,
        max_header_bytes=config.max_header_bytes,
    )
    install_handlers(app)
    _add_facts(app, engine, config, worker, prompts, page)
    _add_generation(app, config, worker, prompts, bodies)
    return app


def _add_facts(
    app: FastAPI,
    engine: Engine,
    config: ServeConfig,
    worker: Worker,
    prompts: Prompts,
    page: Page,
) -> None:
    model = {
        "id": config.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moebound",
    }

    @app.get("/health")
    async def health() -> Response:
        alive = worker.state()["alive"]
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    @app.get("/stats")
    async def stats() -> Response:
        found = await asyncio.to_thread(engine.stats)
        server = {**worker.state(), **worker.stats.to_json()}
        return JSONResponse(
            {"model": config.name, "chat": prompts.has_chat, "server": server, "engine": found}
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        found = await asyncio.to_thread(engine.stats)
        try:
            body, type_ = await asyncio.to_thread(exposition, worker.stats, worker.state(), found)
        except BackendUnavailable as error:
            raise ApiError(501, str(error), kind="server_error", code="unavailable") from error
        return Response(body, headers={"Content-Type": type_})

    @app.get("/")
    async def try_it() -> Response:
        return page.response()

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        _check_model(name, config)
        return JSONResponse(model)


def _add_generation(
    app: FastAPI, config: ServeConfig, worker: Worker, prompts: Prompts, bodies: Bodies
) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer("chat", request, partial(read, ChatRequest, prompts.chat))

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answer(
            "completion", request, partial(read, CompletionRequest, prompts.completion)
        )

    def read(
        type_: type[R], encode: Callable[[R], list[Text]], body: bytes
    ) -> tuple[R, list[Text]]:
        asked = parse(type_, body)
        if asked.model is not None:
            _check_model(asked.model, config)
        asked.check_rest()
        return asked, encode(asked)

    async def answer(
        kind: Kind, request: Request, read: Callable[[bytes], tuple[R, list[Text]]]
    ) -> Response:
        with worker.reserve() as place:  # before anything of the body is read
            try:
                body = await bodies.read(request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            asked, texts = await bodies.beside(partial(read, body))
            events, format_ = Events(), Format(kind, config.name)
            job = Job(texts, events.put, n=asked.n or 1)
            place.submit(job)
        if asked.stream:
            return Stream(worker, job, events, format_, usage=asked.wants_usage)
        return Whole(worker, job, events, format_)


def _check_model(name: str, config: ServeConfig) -> None:
    if name != config.name:
        raise ApiError(
            404,
            f"model {name!r}: this server has {config.name!r}",
            param="model",
            code="model_not_found",
        )
