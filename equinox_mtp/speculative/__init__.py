"""Self-speculative generation: the prediction depths draft, the main model verifies."""

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
