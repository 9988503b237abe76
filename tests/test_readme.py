"""README is executed, not believed."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_written():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "\nassert out.shape == (2, 1, 256) and jnp.isfinite(out).all()\n"
    check += "assert cache.data.shape == (4, 64, 656)\n"
    check += "assert len(attention.o_proj.kernel.get_value().sharding.device_set) == 8\n"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example + check],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_files_and_names_that_it_mentions_exist():
    for path in re.findall(r"`?((?:examples|benchmarks|tests)/[\w/.]+\.\w+)", README):
        assert (ROOT / path).exists(), path
    for module, name in re.findall(r"`(mla_jax|pallas_kernels)\.(\w+)`", README):
        base = ROOT / module / name
        assert base.is_dir() or base.with_suffix(".py").exists(), f"{module}.{name}"
