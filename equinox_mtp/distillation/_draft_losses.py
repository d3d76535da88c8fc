"""What the depths' drafts are worth to the main model."""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from .._alignment import MTPTargets
from .._batch import Batch
from .._decoder import split_auxiliary
from .._expected_acceptance import ExpectedAcceptance, calculate_expected_acceptance
from .._losses import MTPLosses, Objective, TokenLoss, calculate_mtp_loss, loss_weights
from .._model import MTPModel, checked_batch, main_loss
from .._shift import roll_and_mask
from .._types import HostOrDeviceArray, Scalar, checked
from ..cross_entropy import Divergence, LinearDivergence, linear_divergence

DraftDivergence: TypeAlias = Literal[Divergence, "expected_accepted_length"]


class DraftOutput(eqx.Module):
    """Everything that `draft_losses` computed.

    >>> output = eqx.filter_jit(emtp.distillation.draft_losses)(model, batch)
    >>> print(output.losses.weights, output.acceptance.joint.shape)
    [14. 12.] (2,)

    **Fields:**

    - `loss`: what to minimise for the depths: `objective(losses)`.
    - `main`: the main model's cross-entropy, as sum and count. In a compiled function that does not
        use it, it costs nothing.
    - `losses`: per depth, the summed divergences and the number of tokens.
    - `acceptance`: the expected acceptance of sampled drafts, without gradient.
    - `hidden_states`: each MTP layer's raw output, before any norm.
    - `auxiliary`: what the decoder, and the depths' layers, returned alongside hidden states; of a
        decoder that did not run `None`.
    """

    loss: Float[Array, ""]
    main: TokenLoss
    losses: MTPLosses
    acceptance: ExpectedAcceptance
    hidden_states: Float[Array, "depth batch seq embed"]
    auxiliary: PyTree[Any]


@checked
def draft_losses(
    model: MTPModel,
    batch: Batch,
    *,
    divergence: DraftDivergence = "total_variation",
    draft_vocab: Integer[HostOrDeviceArray, "draft_vocab"] | None = None,
    temperature: Scalar = 1.0,
    objective: Objective = calculate_mtp_loss,
    chain_mask: bool = False,
    hidden_states: Float[Array, "batch seq embed"] | None = None,
    key: PRNGKeyArray | None = None,
    inference: bool | None = None,
) -> DraftOutput:
    """The depths' divergences from the main model, in place of their cross-entropies.

    Depth k at position i drafts token t(i+k+1), for which the main model's own distribution is that
    at position i+k, after the same tokens. The loss of depth k is the mean divergence between the
    two over the positions that `align_targets` scores; see `linear_divergence` for the kinds. With
    `"expected_accepted_length"` the loss of depth k is 1 - Π_{j≤k} α_j, where α_j is the
    probability that a draft of depth j is accepted: so the sum over depths is D + 1 - τ, with τ = 1
    + Σ_k Π_{j≤k} α_j, the expected number of tokens that a pass of the main model commits (arXiv
    2211.17192).

    The main model is the teacher, and has no gradient as such. Depths send gradients into it as the
    block's `MTPConfig` says; with `freeze_model` none are computed.

    >>> heads, frozen = emtp.distillation.freeze_model(model)
    >>> @eqx.filter_jit
    ... @eqx.filter_value_and_grad
    ... def loss_and_grads(heads, frozen, batch):
    ...     return emtp.distillation.draft_losses(eqx.combine(heads, frozen), batch).loss
    >>> loss, grads = loss_and_grads(heads, frozen, batch)

    **Arguments:**

    - `model`: a decoder, and the depths over it. Its head is a matrix or a `LinearHead`.
    - `batch`: of `make_batch`, with positions in the order of the text.
    - `divergence`: the kind.
    - `draft_vocab`: the token ids that will be drafted, as for `speculative.generate`; `None` for
        all. See `linear_divergence`.
    - `temperature`: of both distributions; positive. May be traced.
    - `objective`: the reduction of the depths' losses to `loss`, as in `MTPModel`;
        `partial(calculate_mtp_loss, scaling_factor=1.0)` for the depths alone.
    - `chain_mask`: see `align_targets`; ignored if the batch has `targets`.
    - `hidden_states`: the main model's for this batch, **before** its final norm, if they are known
        already; the decoder does not run then.
    - `key`, `inference`: for dropout.

    **Returns:** `DraftOutput`.

    **Raises:** `ValueError` for a temperature that is not positive, a head that is another
    callable, a block without depths, or `hidden_states` of other rows than the batch's.
    """
    batch, targets = checked_batch(model, batch, chain_mask)
    decoder, block = model.decoder, model.block
    context: dict[str, Any] = {
        "position_ids": batch.position_ids,
        "segment_ids": batch.segment_ids,
        "inference": inference,
    }
    decoder_key, block_key = (None, None) if key is None else jax.random.split(key)
    auxiliary = None
    if hidden_states is None:
        output = decoder(jnp.asarray(batch.input_ids), **context, key=decoder_key)
        hidden_states, auxiliary = split_auxiliary(output)
    _check_rows(hidden_states, batch)
    main, _ = main_loss(decoder, hidden_states, batch, predictions=False)
    states = block.depth_states(decoder, hidden_states, targets, **context, key=block_key)
    counts = jnp.sum(targets.mask, axis=(1, 2), dtype=jnp.float32)
    is_joint = divergence == "expected_accepted_length"
    token = _token_divergences(
        states.normed,
        lax.stop_gradient(decoder.final_norm(hidden_states)),
        targets,
        block.head_decoder(decoder).output_head(),
        divergence="total_variation" if is_joint else divergence,
        draft_vocab=draft_vocab,
        temperature=temperature,
        depth_weights=None if is_joint else loss_weights(objective, counts),
    )
    by_token = _one_minus_joint_acceptance(token.divergence) if is_joint else token.divergence
    sums = jnp.sum(jnp.where(targets.mask, by_token, 0), axis=(1, 2))
    losses = MTPLosses(sums, counts)
    return DraftOutput(
        loss=objective(losses),
        main=main,
        losses=losses,
        acceptance=calculate_expected_acceptance(token.acceptance, targets.mask),
        hidden_states=states.hidden_states,
        auxiliary=(auxiliary, states.auxiliary),
    )


def _check_rows(hidden_states: Array, batch: Batch) -> None:
    if hidden_states.shape[:2] != batch.input_ids.shape:
        raise ValueError(
            f"`hidden_states` must be of the rows and positions of `batch`, "
            f"{batch.input_ids.shape}; got {hidden_states.shape[:2]}. Pass what `model.decoder` "
            "makes of the same batch."
        )


def _token_divergences(
    normed: Array,
    teacher_hidden_states: Array,
    targets: MTPTargets,
    head: Any,
    *,
    divergence: Divergence,
    draft_vocab: Any,
    temperature: Scalar,
    depth_weights: Array | None,
) -> LinearDivergence:
    """Each depth's divergences at the position where its drafts begin.

    Depth k's hidden states are moved k positions to the right, to the teacher's: all depths then
    share one set of the teacher's logits.
    """
    mask = _to_teacher(targets.mask)
    # What does not count must be finite, as 0 · NaN is NaN.
    normed = jnp.where(mask[..., None], _to_teacher(normed), 0)
    is_scored = jnp.any(mask, axis=0)[..., None]
    weights = None if depth_weights is None else mask * depth_weights[:, None, None]
    token = linear_divergence(
        normed,
        jnp.where(is_scored, teacher_hidden_states, 0),
        head,
        divergence=divergence,
        draft_vocab=draft_vocab,
        temperature=temperature,
        weights=weights,
    )
    return jax.tree.map(_from_teacher, token)


def _to_teacher(x: Array) -> Array:
    """`out[k-1, b, i+k] = x[k-1, b, i]`, filled with zeros."""
    zero = jnp.zeros((), x.dtype)
    no_padding = [(0, 0, 0)] * (x.ndim - 2)

    def shift(one: Array, k: int) -> Array:
        k = min(k, one.shape[1])
        return lax.pad(one, zero, [(0, 0, 0), (k, -k, 0), *no_padding[1:]])

    return jnp.stack([shift(one, k) for k, one in enumerate(x, start=1)])


def _from_teacher(x: Array) -> Array:
    """The inverse of `_to_teacher`."""
    return jnp.stack([roll_and_mask(one, -k) for k, one in enumerate(x, start=1)])


def _one_minus_joint_acceptance(total_variation: Array) -> Array:
    """1 - Π_{j≤k} (1 - TV_j) of each depth."""
    joint, out = jnp.ones_like(total_variation[0]), []
    for one in total_variation:
        joint = joint * (1 - one)
        out.append(1 - joint)
    return jnp.stack(out)
