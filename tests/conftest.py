"""Test-wide setup: eight simulated CPU devices, and what the gpu markers need."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ and shutil.which("nvidia-smi") is None:
    # Many tests compile the same programs: one cache for this run, all of its workers and the
    # processes that they start.
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Before any device is touched: the stand-in for eight GPUs.
jax.config.update("jax_num_cpu_devices", 8)


def _num_hopper_gpus() -> int:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return 0
    return sum(getattr(d, "compute_capability", "") == "9.0" for d in devices)


def _gpus_needed(item: pytest.Item) -> int:
    if multigpu := item.get_closest_marker("multigpu"):
        return multigpu.args[0] if multigpu.args else 2
    return 1 if item.get_closest_marker("gpu") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = {item: n for item in items if (n := _gpus_needed(item))}
    found = _num_hopper_gpus() if needed else 0
    for item, least in needed.items():
        if found < least:
            reason = f"needs {least} Hopper GPU(s), found {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """jax's strictest modes: no dtype and no rank is promoted but where the code says so."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(
    params=[
        pytest.param(("cpu", 2), id="2-simulated"),
        *(
            pytest.param(("gpu", n), id=f"{n}-GPUs", marks=pytest.mark.multigpu(n))
            for n in (2, 4, 8)
        ),
    ]
)
def devices(request: pytest.FixtureRequest) -> list[jax.Device]:
    """Devices to split heads over: simulated ones on a CPU machine, or real GPUs (`multigpu`)."""
    platform, size = request.param
    if jax.default_backend() != platform:
        pytest.skip("simulates devices where there are none; this machine has real ones")
    return jax.devices()[:size]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped proves nothing, so it fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = getattr(reporter, "stats", {})
    if exitstatus == 0 and stats.get("skipped") and not stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    if stats.get("skipped") and not stats.get("passed") and not stats.get("failed"):
        terminalreporter.write_line("every selected test was skipped: that counts as a failure")
