"""Every strict mode on: eight devices, no silent promotion, warnings are errors, shapes checked."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib

JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
# Tests marked `gpu` run on one with T5X_LITE_TEST_PLATFORM=cuda; all others want eight CPU devices.
os.environ["JAX_PLATFORMS"] = os.environ.get("T5X_LITE_TEST_PLATFORM", "cpu")
# XLA's own passes run as ever; LLVM's, which take two thirds of the tests' time, don't. Bitwise
# equalities are between programs compiled alike.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # The emitters compile for three times as long; from 0.11 on there is no way around them.
        *(["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < (0, 11) else []),
        # In parts it is emitted on several threads, and takes longer on the whole.
        *(["--xla_cpu_parallel_codegen_split_count=1"] if JAXLIB < (0, 11) else []),
        # Eight devices that wait for each other on two busy cores may take more than 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=200",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# Which lines of our files an operation is from is of no use here; carrying it along takes a
# quarter of XLA's time. Processes that tests start inherit this.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# A copy of the TPU compiler, which needs no TPU, in each worker, and no log.
os.environ |= {"TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from t5x_lite import environment  # noqa: E402

environment.set_defaults()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("t5x_lite", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes most of the tests' time; a second run finds the programs of the first.
CACHE = os.environ.get("T5X_LITE_TEST_CACHE", pathlib.Path.home() / ".cache" / "t5x_lite" / "tests")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_finish():
    """What is imported stays; looking it through again and again slows tracing down."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tpu():
    """`tpu("v5e:2x4", num_slices=2)`: devices that programs can be compiled for, not run on."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu, the TPU compiler: pip install t5x_lite[test,tpu]")
    from jax.experimental.topologies import get_topology_desc

    return lambda name, **options: (
        get_topology_desc(platform="tpu", topology_name=name, **options).devices
    )


@pytest.fixture
def uncached():
    """Keeps a test's programs out of the cache, which can't load those for a TPU again."""
    from jax.experimental.compilation_cache import compilation_cache

    def switch(on):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # whether there is one is asked only once

    switch(False)
    yield
    switch(True)
