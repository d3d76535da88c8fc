"""Self-speculative generation: the prediction depths draft, the main model verifies.

`generate` and `stream` are all that most users need. Their phases are public for decoding loops of
your own. The first step after two prompts of two tokens, from which the examples start:

>>> decoding = emtp.speculative.DecodingModel.of(model)
>>> shape = emtp.speculative.DecodingShape(num_drafts=2, max_new_tokens=4)
>>> sampler, no_eos, key = emtp.speculative.Sampler(), jnp.int32(-1), jax.random.key(0)
>>> prompts, lengths = jnp.asarray([[5, 6], [9, 3]], jnp.int32), jnp.asarray([2, 2], jnp.int32)
>>> phases = emtp.speculative.prefill, emtp.speculative.draft, emtp.speculative.verify
>>> prefill, draft, verify = map(eqx.filter_jit, phases)
>>> state = prefill(decoding, prompts, lengths, shape, sampler, eos_id=no_eos, key=key)
>>> drafts, draft_caches = draft(decoding, state, shape, sampler, key=key)
>>> verification, main_cache = verify(decoding, state, drafts, sampler, key=key)
"""

from ._frequent_ids import frequent_ids
from ._generate import StreamedStep, generate, stream
from ._measure import PositionalAcceptance, measure_acceptance
from ._model import DecodingModel
from ._sampling import Sampler, Verdict, accept_drafts
from ._shape import DecodingShape
from ._state import DecodingState, Drafts, Generation, Verification
from ._steps import commit, draft, prefill, step, verify

__all__ = [
    "DecodingModel",
    "DecodingShape",
    "DecodingState",
    "Drafts",
    "Generation",
    "PositionalAcceptance",
    "Sampler",
    "StreamedStep",
    "Verdict",
    "Verification",
    "accept_drafts",
    "commit",
    "draft",
    "frequent_ids",
    "generate",
    "measure_acceptance",
    "prefill",
    "step",
    "stream",
    "verify",
]
