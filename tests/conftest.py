"""Test-wide setup: eight simulated CPU devices, and what the gpu markers need."""

import jax
import pytest

# Before any device is touched: the stand-in for eight GPUs.
jax.config.update("jax_num_cpu_devices", 8)


def _num_hopper_gpus() -> int:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return 0
    return sum(getattr(d, "compute_capability", "") == "9.0" for d in devices)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = {"gpu": 1, "multigpu": 2}
    marked = [i for i in items if any(i.get_closest_marker(m) for m in needed)]
    found = _num_hopper_gpus() if marked else 0
    for item in marked:
        least = max(n for marker, n in needed.items() if item.get_closest_marker(marker))
        if found < least:
            reason = f"needs {least} Hopper GPU(s), found {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


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
