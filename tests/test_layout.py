import ast
import pathlib

import pytest

from pallas_kernels import layout

ROOT = pathlib.Path(__file__).parents[1]


def test_the_row_of_fp8_ds_mla():
    assert layout.LATENT_DIM == 576
    assert layout.FP8_ROW_BYTES == 656
    assert layout.fp8_row_bytes(256, 32) == 256 + 8 + 64
    assert layout.fp8_row_bytes(128, 0) == 132


@pytest.mark.parametrize("kv_lora_rank", [0, -128, 64, 500])
def test_latents_that_are_not_whole_tiles(kv_lora_rank):
    with pytest.raises(
        ValueError, match=f"kv_lora_rank={kv_lora_rank} must be a positive multiple"
    ):
        layout.fp8_row_bytes(kv_lora_rank, 64)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pallas_kernels").glob("*.py")), ids=lambda p: p.name
)
def test_kernels_know_nothing_of_the_library_above(path):
    assert not [m for m in imports(path) if m.split(".")[0] in ("mla_jax", "flax")]


@pytest.mark.parametrize("sm_scale", [0.0, -0.1, float("inf"), float("nan")])
def test_refuses_a_scale_that_is_none(sm_scale):
    with pytest.raises(ValueError, match="sm_scale="):
        layout.check_sm_scale(sm_scale)
