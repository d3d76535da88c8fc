"""Fixtures and settings that every test shares."""

import atexit
import os
import shutil
import tempfile

# JAX reads both when it starts, hence before anything imports it. Eight devices on one CPU make
# the sharded tests real; asking for another platform is still possible.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Most of the time goes into compiling programs that run once: half of it into LLVM's optimisations.
# They are tested where the flag is set already, as the second environment of CI does.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    _FLAGS.append("--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Many tests, and the processes and notebooks they start, compile the same programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="equinox_mtp_compiled_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import itertools  # noqa: E402
from collections.abc import Callable  # noqa: E402

import hypothesis  # noqa: E402
import jax.random as jr  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import PRNGKeyArray  # noqa: E402

# The first example of a shape compiles, and takes far longer than the next: no deadline holds.
hypothesis.settings.register_profile("equinox_mtp", deadline=None, max_examples=40)
hypothesis.settings.load_profile("equinox_mtp")


@pytest.fixture
def getkey() -> Callable[[], PRNGKeyArray]:
    """A function that gives a fresh key at every call, the same ones in every run."""
    seeds = itertools.count()
    return lambda: jr.key(next(seeds))
