"""What a tokenizer or a chat template of a checkpoint can raise, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moebound.errors import CheckpointError, MoeboundError
from moebound.evaluate.loading import Loaded
from moebound.model.pretrained import load_tokenizer, named
from moebound.text import rendering
from moebound.text.encoding import chat_text, check_tokens, encode, encode_all, encode_chat
from moebound.text.generation import GenerationSettings, generate
from moebound.text.templates import RENDERER, Renderer

USER = [{"role": "user", "content": "Ava has 3 books."}]


def test_a_template_makes_what_transformers_makes_of_it(loaded: Loaded) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    expected = loaded.tokenizer.apply_chat_template(
        USER, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert chat_text(loaded.tokenizer, USER, template=template) == expected
    ids = encode_chat(loaded.tokenizer, USER)
    assert ids == loaded.tokenizer.apply_chat_template(
        USER, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].foo.bar }}", "no attribute 'foo'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ 'a' * 10**10 }}", "512 MiB"),
        ("{{ '%1000000000d' % 1 }}", "512 MiB"),
        ("{{ 'a' * (40 * 1024 * 1024) }}", "32 MiB"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}", "512 MiB"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_named(loaded: Loaded, template: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        chat_text(loaded.tokenizer, USER, template=template)
    assert chat_text(loaded.tokenizer, USER, template="fine") == "fine"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages | length ** (9 ** 9) ** 9 if false else (7 ** (9 ** 9)) }}",
    ],
)
def test_a_template_that_never_ends_is_ended(
    template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The same program with less time.
    text = (
        Path(rendering.__file__).read_text(encoding="utf-8").replace("CPU_S = 5.0", "CPU_S = 0.3")
    )
    (tmp_path / "rendering.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr("moebound.text.templates.__file__", str(tmp_path / "templates.py"))
    renderer = Renderer()
    try:
        with pytest.raises(CheckpointError, match="runs for more than"):
            renderer.render(template, USER, {})
        assert renderer.render("after it", USER, {}) == "after it"
    finally:
        renderer.close()


def test_a_renderer_that_was_killed_is_started_again() -> None:
    assert RENDERER.render("a", USER, {}) == "a"
    process = RENDERER._process
    assert process is not None
    process.kill()
    process.wait()
    assert RENDERER.render("b", USER, {}) == "b"


class Panic(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("error", [Exception, TypeError, ValueError, Panic, RecursionError])
def test_whatever_a_tokenizer_raises_is_named(error: type[BaseException]) -> None:
    def tokenizer(texts: Any, **options: Any) -> Any:
        raise error("no [UNK]")

    with pytest.raises(CheckpointError, match=r"tokenizer.*no \[UNK\]"):
        encode(tokenizer, "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit, MoeboundError])
def test_what_is_not_the_librarys_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), named("a file"):
        raise error


def test_half_of_a_surrogate_pair_is_no_text(loaded: Loaded) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        encode(loaded.tokenizer, "a\ud800")
    assert encode_all(loaded.tokenizer, []) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\ud83d"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="cannot be loaded as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_token_beyond_the_embedding_is_named(loaded: Loaded) -> None:
    n = loaded.model.get_input_embeddings().weight.shape[0]
    check_tokens([0, n - 1], loaded.model, "it")
    with pytest.raises(CheckpointError, match=f"the prompt: token {n}: .* 0 to {n - 1}"):
        generate(loaded.model, loaded.tokenizer, [1, n], GenerationSettings(1))


@pytest.mark.parametrize("stop", ["ab", ("",), (None,), (1,), (b"a",)])
def test_stop_texts_are_texts(stop: Any) -> None:
    with pytest.raises(MoeboundError, match="stop"):
        GenerationSettings(1, stop=stop)
