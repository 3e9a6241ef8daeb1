"""`moebound generate`: text from a model whose experts stay compressed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.offload import (
    free_for_kv,
    kv_bytes,
    load_offloaded,
    offload_options,
    stats_facts,
    time_spent,
    together_options,
    where_time_went,
)
from moebound.cli.output import Output, output_options
from moebound.errors import MoeboundError

if TYPE_CHECKING:
    from moebound.text.generation import Piece


def _biases(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> dict[int, float]:
    found = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"{text!r}: expected TOKEN=BIAS, as 42=-100") from error
    return found


def _schema(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except ValueError as error:  # of JSON, or of its encoding
        raise MoeboundError(f"{path}: expected a JSON Schema: {error}") from error
    return text


@click.command()
@click.argument("src", metavar="STORE")
@click.option("--prompt", "prompts", required=True, multiple=True, metavar="TEXT",
              help="What the text goes on from; may be repeated, for texts that are generated "
                   "together.")  # fmt: skip
@click.option("--chat", is_flag=True, help="The prompt is a message, in the tokenizer's template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
              metavar="N", help="Tokens to write at most.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="0 takes the likeliest token.")  # fmt: skip
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
              show_default=True, help="Of this much probability together.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, metavar="K",
              help="Of the K likeliest tokens; 0 for all.")  # fmt: skip
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Of tokens with this share of the likeliest one's probability.")  # fmt: skip
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0,
              show_default=True,
              help="Divides the scores of tokens that prompt or text have.")  # fmt: skip
@click.option("--presence-penalty", type=click.FloatRange(-2, 2), default=0.0, show_default=True,
              help="Taken from the score of each token that the text has.")  # fmt: skip
@click.option("--frequency-penalty", type=click.FloatRange(-2, 2), default=0.0, show_default=True,
              help="The same, once for each time.")  # fmt: skip
@click.option("--logit-bias", multiple=True, metavar="TOKEN=BIAS", callback=_biases,
              help="Added to the score of a token id, -100 to 100; may be repeated.")  # fmt: skip
@click.option("--json-schema", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              metavar="FILE", help="The text is JSON of this JSON Schema.")  # fmt: skip
@click.option("--seed", type=int, help="Of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the text; may be repeated.")
@click.option(
    "--stats", is_flag=True, help="Where the time went, and what was read, waited for and computed."
)
@together_options
@offload_options
@output_options
def generate(
    output: Output,
    src: str,
    prompts: tuple[str, ...],
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    logit_bias: dict[int, float],
    json_schema: Path | None,
    seed: int | None,
    stop: tuple[str, ...],
    stats: bool,
    max_sequences: int,
    kv_budget: str | None,
    offload: dict[str, Any],
) -> int:
    """Generate text with STORE, its experts read and decoded as they are needed.

    STORE is a store, or an ordinary checkpoint, whose experts are then read as they are. The text
    is the same as that of the decompressed model in memory, whatever the budget. Of several prompts
    each has the text that it has alone, and the draws of the same seed.
    """
    from moebound.text.generation import GenerationSettings
    from moebound.text.together import generate_together

    settings = GenerationSettings(
        max_new_tokens,
        temperature,
        top_p,
        seed,
        stop,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        json_schema=None if json_schema is None else _schema(json_schema),
    )
    kv_given = kv_bytes(kv_budget)
    with load_offloaded(src, offload, output) as offloaded:
        ids = [_tokens(offloaded.tokenizer, prompt, chat) for prompt in prompts]
        offloaded.meter.reset()
        begun = time.perf_counter()
        found: list[list[Piece]] = [[] for _ in prompts]
        shown = 0
        for index, piece in generate_together(
            offloaded.model, offloaded.tokenizer, ids, settings, continues=not chat,
            most=max_sequences,
            kv_budget=free_for_kv(offloaded) if kv_given is None else kv_given,
        ):  # fmt: skip
            found[index].append(piece)
            if not output.as_json:
                shown = _show(found, index, shown)
        total_s = time.perf_counter() - begun
        told = offloaded.stats()
    texts = [_document(pieces) for pieces in found]
    document: dict[str, Any] = dict(texts[0]) if len(texts) == 1 else {"texts": texts}
    document["predicted_seconds_per_token"] = told["choice"]["predicted_s"]
    if len(texts) > 1:
        document |= {"total_s": total_s, "tokens_per_second": _n_new(texts) / total_s}
    if stats:
        document["stats"] = told
        document["time"] = time_spent(told, total_s)
    times = _times(texts[0]) if len(texts) == 1 else _times_of_all(texts, total_s)
    human: list[Any] = []
    if stats:
        human = [wording.facts("", [*times, *stats_facts(told)]), where_time_went(told, total_s)]
    output.result(document, *human)
    return exits.OK


def _show(found: list[list[Piece]], index: int, shown: int) -> int:
    """Print what is new: one text as it comes, of several each when all before it are complete.
    shown: so many are. Returns how many are now."""
    if len(found) == 1:
        piece = found[0][-1]
        click.echo(piece.text, nl=piece.finish is not None)
        return int(piece.finish is not None)
    while shown < len(found) and found[shown] and found[shown][-1].finish is not None:
        text = "".join(piece.text for piece in found[shown])
        click.echo(f"[{shown + 1}] {text}")
        shown += 1
    return shown


def _document(pieces: list[Piece]) -> dict[str, Any]:
    finish = pieces[-1].finish
    assert finish is not None  # of the last piece of any text
    return {
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": finish.reason,
        "prompt_tokens": finish.n_prompt,
        "new_tokens": finish.n_new,
        "first_token_s": finish.first_token_s,
        "seconds_per_token": finish.seconds_per_token,
    }


def _n_new(texts: list[dict[str, Any]]) -> int:
    return sum(text["new_tokens"] for text in texts)


def _tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    from moebound.text.encoding import encode, encode_chat

    if not chat:
        return encode(tokenizer, prompt)
    if not getattr(tokenizer, "chat_template", None):
        raise MoeboundError("--chat: this model's tokenizer has no chat template")
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def _times(document: dict[str, Any]) -> list[tuple[str, str]]:
    first, each = document["first_token_s"], document["seconds_per_token"]
    return [
        ("tokens", f"{document['prompt_tokens']} read, {document['new_tokens']} written"),
        ("first token", "-" if first is None else f"{1e3 * first:.1f} ms"),
        ("each further one", "-" if each is None else f"{1e3 * each:.2f} ms"),
    ]


def _times_of_all(texts: list[dict[str, Any]], total_s: float) -> list[tuple[str, str]]:
    n_prompt, n_new = sum(text["prompt_tokens"] for text in texts), _n_new(texts)
    return [
        ("texts", f"{len(texts)}, in {total_s:.2f} s"),
        ("tokens", f"{n_prompt} read, {n_new} written, {n_new / total_s:.2f} a second"),
    ]
