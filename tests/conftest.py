"""What every test runs under: the CPU, no implicit rank promotion, checks of the shapes in signatures."""

import gc
import os
from pathlib import Path

import pytest


os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser):
    parser.addoption(
        "--no-typecheck",
        action="store_true",
        help="do not check the shapes and types in eqgen's signatures while the tests run",
    )
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile as users do, not in a third of the time; what runs for long is then faster",
    )


def pytest_configure(config):
    if not config.getoption("--optimize"):
        # XLA's newer way to write the code of fused loops takes half of the time of a test that compiles.
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Accelerators multiply in TF32 by default, which would need tolerances wide enough to hide real errors.
    jax.config.update("jax_default_matmul_precision", "highest")
    # Most tests compile for far longer than they run.
    jax.config.update("jax_disable_most_optimizations", not config.getoption("--optimize"))
    # Compiled functions are kept between runs: the second run of the suite does not compile.
    jax.config.update("jax_compilation_cache_dir", str(config.rootpath / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

    if not config.getoption("--no-typecheck"):
        from jaxtyping import install_import_hook

        install_import_hook("eqgen", "helpers.typechecked")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """XLA keeps all that a process compiled. After hundreds of programs a worker was killed while it stored one, so
    a large worker forgets them between files; what they need again comes from the cache on disk."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2e9:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def getkey():
    """A function that returns a fresh PRNG key at every call, the same ones in every run."""
    import jax.random as jr

    keys = iter(range(2**31))
    return lambda: jr.fold_in(jr.key(0), next(keys))


@pytest.fixture
def x64():
    """Double precision for the length of one test; arrays made before it stay single."""
    import jax

    with jax.enable_x64(True):
        yield
