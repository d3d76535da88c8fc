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

from ._generate import (
    StreamedStep as StreamedStep,
    generate as generate,
    stream as stream,
)
from ._measure import (
    PositionalAcceptance as PositionalAcceptance,
    measure_acceptance as measure_acceptance,
)
from ._model import DecodingModel as DecodingModel
from ._sampling import (
    Sampler as Sampler,
    Verdict as Verdict,
    accept_drafts as accept_drafts,
)
from ._state import (
    DecodingState as DecodingState,
    Drafts as Drafts,
    Generation as Generation,
    Verification as Verification,
)
from ._steps import (
    DecodingShape as DecodingShape,
    commit as commit,
    draft as draft,
    prefill as prefill,
    step as step,
    verify as verify,
)
