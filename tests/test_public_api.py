import inspect

import pytest

import mla_jax

PUBLIC = {
    "IndexerConfig",
    "LatentCache",
    "MLAConfig",
    "MultiHeadLatentAttention",
    "SparseMultiHeadLatentAttention",
    "allocate_pages",
    "logical_to_physical",
    "mla_decode",
    "mla_prefill",
    "mla_sparse_attention",
    "padded_num_heads",
    "tensor_parallel",
}


def test_public_names_are_frozen():
    names = {
        name
        for name, value in vars(mla_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    # Not inspect.getdoc: inherited and generated docstrings do not count.
    doc = vars(getattr(mla_jax, name)).get("__doc__") or getattr(mla_jax, name).__doc__
    assert len(doc.splitlines()) > 3
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize(
    "op", [mla_jax.mla_decode, mla_jax.mla_prefill, mla_jax.mla_sparse_attention]
)
def test_sm_scale_has_no_default(op):
    parameter = inspect.signature(op).parameters["sm_scale"]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default is parameter.empty
