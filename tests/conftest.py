"""Fixtures and settings that every test shares."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# JAX reads both when it starts, hence before anything imports it. Eight devices on one CPU make
# the sharded tests real; asking for another platform is still possible.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Most of the time goes into compiling programs that run once: half of it into LLVM's optimisations.
# They are tested where the flag is set already, as CI does for some files.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    _FLAGS.append("--xla_backend_optimization_level=0")
    if importlib.metadata.version("jaxlib") < "0.11":
        # The older emitters compile in a third of the time; later versions have none.
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
        _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Many tests, and the processes and notebooks they start, compile the same programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="equinox_mtp_compiled_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    # Tokens of texts, which are the user's own otherwise.
    os.environ["EQUINOX_MTP_CACHE"] = f"{_CACHE}/tokens"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import gc  # noqa: E402
import itertools  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import equinox as eqx  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.random as jr  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import PRNGKeyArray  # noqa: E402

# Programs and their traces are objects by the million, and hardly any of them is garbage.
gc.set_threshold(200_000, 50, 100)

# The first example of a shape compiles, and takes far longer than the next: no deadline holds.
hypothesis.settings.register_profile("equinox_mtp", deadline=None, max_examples=40)
hypothesis.settings.load_profile("equinox_mtp")


_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 20_000
_JITTED: Any = type(jax.jit(lambda: None))


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Every compiled program maps memory, of which Linux lets a process have 65,530 pieces.

    At the next one LLVM ends the process by a segmentation fault. A module of tests adds up to a
    few thousand.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        eqx.clear_caches()
        for thing in gc.get_objects():
            # Functions of a module live on, with what was compiled for them.
            if type(thing) is _JITTED:
                thing.clear_cache()
        gc.collect()


@pytest.fixture
def getkey() -> Callable[[], PRNGKeyArray]:
    """A function that gives a fresh key at every call, the same ones in every run."""
    seeds = itertools.count()
    return lambda: jr.key(next(seeds))
