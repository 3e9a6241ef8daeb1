"""Tasks of lm-eval: scored by it where it is installed, and a clear word where it is not."""

from __future__ import annotations

import importlib.util

import pytest

from moebound.errors import BackendUnavailable
from moebound.tasks.lm_eval import Metric, metrics, run_lm_eval

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_it_the_command_that_installs_it() -> None:
    with pytest.raises(BackendUnavailable, match=r"pip install 'moebound\[lm-eval\]'"):
        run_lm_eval(None, None, "lm-eval:hellaswag")


def test_its_results_are_read() -> None:
    found = metrics(
        {"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5,
                   "exact_match_stderr,strict-match": 0.1, "word_perplexity,none": 12.0,
                   "word_perplexity_stderr,none": "N/A", "sample_len": 3}}
    )  # fmt: skip
    assert found == [
        Metric("gsm8k", "exact_match (strict-match)", 0.5, 0.1),
        Metric("gsm8k", "word_perplexity", 12.0, None),
    ]
