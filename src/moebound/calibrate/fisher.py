"""Statistics weighted by what the loss feels: the Fisher information of each matrix, in two parts.

For a small change E of a matrix, the KL of the changed model to the original, summed over the text,
is ½ vec(E)ᵀ F vec(E), where F is the Fisher information: F = Σ_t (δ_t δ_tᵀ) ⊗ (x_t x_tᵀ) over
tokens t, with δ_t the gradient of -log p(label) by what the matrix gives for that token, and labels
drawn from the model's own predictions. Labels of the text instead would give what is called the
empirical Fisher, which is another thing (Kunstner et al., 1905.12558). Drawn once for each token:
the sum over thousands of them is what counts.

F does not fit anywhere. Kept are, as in K-FAC (Martens and Grosse, 1503.05671) with a diagonal for
the outputs,

    A = Σ_t s_t x_t x_tᵀ   with s_t = Σ_i δ_ti² over the channels i (of gate and up together)
    r_i = Σ_t δ_ti²        so that F of row i is about A r_i / Σ r

δ contains the routing weight g, and all that comes behind the expert.

Where answers count W times, the loss of their tokens counts √W times, and so δ_t δ_tᵀ W times: F is
then that of W times the KL of answers, and once that of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moebound.calibrate.text import Text
from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.text import Batch

READ_TOKENS = 1024
"""Tokens that are read forward and backward at once, padding counted."""
_DRAWN_TOKENS = 64
"""Tokens whose predictions are summed up in float64 at once."""


class Labels:
    """Labels drawn from a model's own predictions: of a token always the same, whatever is read
    beside it, for the same model and text. answer_weight: W."""

    def __init__(self, text: Text, answer_weight: float = 1.0) -> None:
        self._seed = int(text.sha256[:15], 16)
        self._prompts, self._root = text.prompts, math.sqrt(answer_weight)

    def loss(self, logits: torch.Tensor, batch: Batch, indices: list[int]) -> torch.Tensor:
        """Σ -log p(label) over all tokens that are no padding, times √W of an answer's. logits:
        [B, T, V]. indices: of the batch's sequences, in the text."""
        logs = logits.float().log_softmax(-1)
        total = logs.new_zeros(())
        for row, index in enumerate(indices):
            own = logs[row][batch.attention_mask[row].bool().to(logs.device)]
            draw = torch.Generator().manual_seed(self._seed + index)
            numbers = torch.rand(len(own), 1, generator=draw, dtype=torch.float64)
            parts = (torch.split(part, _DRAWN_TOKENS) for part in (own.detach(), numbers))
            label = torch.cat([_drawn(*some) for some in zip(*parts, strict=True)])
            losses = own.gather(1, label.to(own.device))
            if self._root != 1:  # the first token of an answer is predicted by the prompt's last
                weights = torch.ones_like(losses)
                weights[self._prompts[index] - 1 :] = self._root
                losses = losses * weights
            total = total - losses.sum()
        return total


def predicted(found: Any, name: str) -> torch.Tensor:
    """The logits [B, T, V] that a model gave. Raises UnsupportedArchitectureError without any."""
    logits = getattr(found, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise UnsupportedArchitectureError(
            f"{name}: predicts no tokens, so there is no loss to feel; leave --fisher out"
        )
    return logits


def _drawn(logs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[T, 1], a label for each row of log p [T, V]. numbers: [T, 1], of 0 to 1."""
    # By comparing with sums, in float64: the same draw where predictions are nearly so.
    below = logs.double().exp().cumsum(1).cpu()
    return torch.searchsorted(below, numbers * below[:, -1:]).clamp_max(logs.shape[1] - 1)


@contextmanager
def with_gradients(model: Any) -> Iterator[None]:
    """Gradients flow through the activations of `model`, and no weight gets one."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)

    def begin(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


class Recomputing:
    """Keeps of each decoder layer what enters it, and computes the rest again when the gradient
    comes: the same values, by the same operations. Open it in a `with`.

    now: whether a layer is computed again, so that what listens to it has heard it before.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self.now = False

    def __enter__(self) -> Recomputing:
        self._before = [vars(layer).get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.forward = self._checkpointed(layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(
                partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), self._again()),
            )  # fmt: skip

        return run

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.now = True
        try:
            yield
        finally:
            self.now = False


@contextmanager
def told_of_gradients(
    module: Any, told: Callable[[torch.Tensor], None], recomputing: Recomputing
) -> Iterator[None]:
    """`told` is called with the gradient [T, H] of the loss by each output of the module."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if recomputing.now:
            return
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda g: told(g.detach().reshape(-1, g.shape[-1]))
        )

    with ExitStack() as stack:
        stack.callback(module.register_forward_hook(hook).remove)
        yield
