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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from moebound.calibrate.text import Text
from moebound.evaluate.text import Batch

READ_TOKENS = 1024
"""Tokens whose activations are kept at once, padding counted."""


class Labels:
    """Labels drawn from a model's own predictions: of a token always the same, whatever is read
    beside it, for the same model and text."""

    def __init__(self, text: Text) -> None:
        self._seed = int(text.sha256[:15], 16)

    def loss(self, logits: torch.Tensor, batch: Batch, indices: list[int]) -> torch.Tensor:
        """Σ -log p(label) over all tokens that are no padding. logits: [B, T, V]. indices: of the
        batch's sequences, in the text."""
        logs = logits.float().log_softmax(-1)
        total = logs.new_zeros(())
        for row, index in enumerate(indices):
            own = logs[row][batch.attention_mask[row].bool().to(logs.device)]
            draw = torch.Generator().manual_seed(self._seed + index)
            # By comparing with sums, in float64: the same draw where predictions are nearly so.
            below = own.detach().double().exp().cumsum(1).cpu()
            drawn = torch.rand(len(own), 1, generator=draw, dtype=torch.float64) * below[:, -1:]
            label = torch.searchsorted(below, drawn).clamp_max(own.shape[1] - 1)
            total = total - own.gather(1, label.to(own.device)).sum()
        return total


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


@contextmanager
def told_of_gradients(module: Any, told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`told` is called with the gradient [T, H] of the loss by each output of the module."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda g: told(g.detach().reshape(-1, g.shape[-1]))
        )

    with ExitStack() as stack:
        stack.callback(module.register_forward_hook(hook).remove)
        yield
