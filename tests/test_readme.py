"""README says what is there; its examples are run by tests/test_examples.py."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_code_is_that_of_the_examples():
    module, function = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert (ROOT / "examples/tensor_parallel.py").read_text().endswith(module)
    assert function in (ROOT / "examples/ops.py").read_text()


def test_files_and_names_that_it_mentions_exist():
    for path in re.findall(r"`?((?:examples|benchmarks|tests)/[\w/.]+\.\w+)", README):
        assert (ROOT / path).exists(), path
    for module, name in re.findall(r"`(mla_jax|pallas_kernels)\.(\w+)`", README):
        base = ROOT / module / name
        assert base.is_dir() or base.with_suffix(".py").exists(), f"{module}.{name}"
