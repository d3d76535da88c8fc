"""The arithmetic of a training step: what a speed in tokens is of the speed of the hardware."""

from typing import NamedTuple

from ._checks import check_integer
from ._decoder import logit_sizes
from ._model import MTPModel
from ._types import checked
from .stacking import layer_shapes


class FlopsPerToken(NamedTuple):
    """Floating-point operations of the forward pass, as means over the tokens of a row.

    >>> flops = emtp.FlopsPerToken(decoder=10.0, head=4.0, depths=(3.0, 3.0))
    >>> flops.forward, flops.training
    (28.0, 84.0)

    **Fields:**

    - `decoder`: of the main model's layers.
    - `head`: of the output head, once.
    - `depths`: of each prediction depth, its projection and its layer, without the head.
    """

    decoder: float
    head: float
    depths: tuple[float, ...]

    @property
    def forward(self) -> float:
        """Of the forward pass of the model with all depths; each passes the head once more."""
        return self.decoder + self.head + sum(depth + self.head for depth in self.depths)

    @property
    def training(self) -> float:
        """Of a training step: each product of the forward pass has two in the backward pass.

        So it is where gradients reach everything: `MTPConfig.stop_gradient_head` and the like save
        some, and a frozen main model most.
        """
        return 3 * self.forward


@checked
def flops_per_token(model: MTPModel, *, seq_len: int) -> FlopsPerToken:
    """The floating-point operations that a model needs for a token, whatever program computes them.

    For model FLOPs utilisation, as PaLM defines it (arXiv 2204.02311, appendix B):

        utilisation = training FLOPs a token · tokens a second / FLOPs a second of the hardware

    Products of matrices count, a multiplication and an addition each; embedding lookups, norms,
    rotary positions, softmaxes and the optimizer do not.

    - Attention counts what a position sees, `(seq_len + 1) / 2` keys in the mean, or fewer in a
        window. PaLM counts `seq_len`. What is computed lies between: XLA's formula takes the whole
        square, kernels and tiles those of its tiles that are not all masked, and their backward
        passes make the logits once more. Documents in packed rows see less; that is not known here.
    - Latent attention has keys and values of every head, as trained.
    - Of a mixture of experts a token passes `top_k`, the router and the shared expert.
    - Gated delta layers count their chunks as they are computed.
    - What is recomputed in the backward pass (`checkpoint_policy`) is not counted.

    Layers, attention and feed-forward networks answer for themselves by their method
    `flops_per_token`. Those of your own inherit one that counts two operations for each number of
    every matrix; one that multiplies activations with one another should add these. An output head
    that is a function counts as one linear map.

    >>> shapes = eqx.filter_eval_shape(lambda: model)  # allocates nothing
    >>> flops = emtp.flops_per_token(shapes, seq_len=8)
    >>> flops.decoder, flops.head, len(flops.depths)
    (8480.0, 1024.0, 2)
    >>> tokens_per_s, peak = 1e6, 1e12
    >>> print(f"{flops.training * tokens_per_s / peak:.0%}")
    9%

    **Arguments:**

    - `model`: with arrays, or with the shapes that `equinox.filter_eval_shape` gives.
    - `seq_len`: positions per row, at least 1.

    **Returns:** `FlopsPerToken`.

    **Raises:** `ValueError` for a `seq_len` below 1.
    """
    seq_len = check_integer("seq_len", seq_len, at_least=1)
    block, depths = model.block, ()
    if block.layers is not None:
        # A repeated layer is stored once, and runs at every depth.
        of_depth = layer_shapes(block.layers).flops_per_token(seq_len)
        depths = (float(of_depth),) * block.config.num_depths
    embed, vocab = logit_sizes(model.decoder)
    decoder = float(model.decoder.flops_per_token(seq_len))
    return FlopsPerToken(decoder=decoder, head=2.0 * embed * vocab, depths=depths)
