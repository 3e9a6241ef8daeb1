"""`moebound serve`: the OpenAI API for one model."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moebound.cli import exits, wording
from moebound.cli.offload import (
    free_for_kv,
    kv_bytes,
    load_offloaded,
    offload_options,
    together_options,
)
from moebound.cli.output import Output, output_options
from moebound.errors import MoeboundError

KEY_VARIABLE = "MOEBOUND_API_KEY"


@click.command()
@click.argument("src")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="Port; 0 for one that is free.")  # fmt: skip
@click.option("--api-key", metavar="KEY",
              help=f"What every request must bear, on every route. Better in {KEY_VARIABLE}: other "
                   "users of a machine can see command lines.")  # fmt: skip
@click.option("--name", metavar="NAME", help="The model's name in the API.  [default: SRC's]")
@click.option("--queue", type=click.IntRange(min=0), default=16, show_default=True, metavar="N",
              help="Requests that may wait; more get 429.")  # fmt: skip
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), metavar="N",
              help="Longer prompts get 400.  [default: the model's positions]")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N",
              help="New tokens of a request.  [default: what the positions leave]")  # fmt: skip
@click.option("--max-body-bytes", type=click.IntRange(min=1), metavar="N",
              help="Larger requests get 413.  [default: what the model's positions can hold, at "
                   "most 4 MiB]")  # fmt: skip
@click.option("--max-header-bytes", type=click.IntRange(min=256), default=16 << 10,
              show_default=True, metavar="N", help="Longer heads get 431.")  # fmt: skip
@click.option("--max-connections", type=click.IntRange(min=1), default=256, show_default=True,
              metavar="N", help="With more, the one that is idle for longest ends.")  # fmt: skip
@click.option("--receive-timeout", type=click.FloatRange(min=0, min_open=True), default=20.0,
              show_default=True, metavar="SECONDS",
              help="For the head of a request to arrive, and for its body.")  # fmt: skip
@click.option("--send-timeout", type=click.FloatRange(min=0, min_open=True), default=20.0,
              show_default=True, metavar="SECONDS",
              help="A client that takes nothing for so long is cut off.")  # fmt: skip
@click.option("--grace", type=click.FloatRange(min=0), default=10.0, show_default=True,
              metavar="SECONDS", help="What running requests are given at shutdown.")  # fmt: skip
@click.option("--chat-template", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              metavar="FILE", help="Jinja, in place of the tokenizer's own.")  # fmt: skip
@together_options
@offload_options
@output_options
def serve(
    output: Output,
    src: str,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    queue: int,
    max_prompt_tokens: int | None,
    max_tokens: int | None,
    max_body_bytes: int | None,
    max_header_bytes: int,
    max_connections: int,
    receive_timeout: float,
    send_timeout: float,
    grace: float,
    chat_template: Path | None,
    max_sequences: int,
    kv_budget: str | None,
    offload: dict[str, Any],
) -> int:
    """Serve SRC, a store or a checkpoint, to clients of the OpenAI API.

    /v1/models, /v1/chat/completions and /v1/completions, streamed or not; /health, /stats and
    /metrics; a page at / to try the model. Up to --max-sequences texts are generated at a time,
    others wait, in order. Ctrl-C or SIGTERM ends it, with exit code 0.

    --json: one document on stdout, as soon as requests are taken, with the URL.
    """
    from moebound.text.serve import server
    from moebound.text.serve.config import ServeConfig

    # Everything that can be wrong with what was asked is found before the model is loaded.
    config = ServeConfig(
        name=name or _name(src),
        api_key=_api_key(api_key),
        queue=queue,
        max_sequences=max_sequences,
        kv_budget=kv_bytes(kv_budget),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        max_header_bytes=max_header_bytes,
        max_connections=max_connections,
        receive_s=receive_timeout,
        send_s=send_timeout,
        grace_s=grace,
        chat_template=None if chat_template is None else _template(chat_template),
    )
    bound = server.bind(host, port)
    with closing(bound):
        if config.api_key is None and not server.is_loopback(bound):
            output.note(
                f"warning: {host} is reachable from elsewhere, and there is no API key: whoever "
                "reaches it can use it"
            )
        with closing(load_offloaded(src, offload, output)) as engine:
            url = server.url(bound)
            if config.kv_budget is None:
                config = replace(config, kv_budget=free_for_kv(engine))
            document = {"url": url, "model": config.name, "pid": os.getpid()}

            def ready() -> None:
                output.result(
                    document,
                    wording.facts(
                        f"serving {src}",
                        [
                            ("URL", url),
                            ("page to try it", url.removesuffix("v1")),
                            ("model", config.name),
                            ("API key", "none" if config.api_key is None else "on every route"),
                            ("at a time", f"{max_sequences} texts; {queue} requests may wait"),
                            ("end", "Ctrl-C"),
                        ],
                    ),
                )

            found = server.serve(
                engine, config, bound,
                on_ready=ready, on_record=lambda record: output.note(record.line()),
            )  # fmt: skip
    output.note(_summary(found))
    return exits.OK


def _name(src: str) -> str:
    return Path(src).resolve().name if Path(src).exists() else src


def _api_key(given: str | None) -> str | None:
    # An empty variable is a mistake in a script, and must not open the server.
    return os.environ.get(KEY_VARIABLE) if given is None else given


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MoeboundError(f"{path}: expected a template in UTF-8: {error}") from error


def _summary(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["requests"].items())
    return f"requests: {counts}; {found['new_tokens']} tokens generated"
