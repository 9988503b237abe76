"""The attention kernels' own code, run on a CPU by `tests.emulator`, against the oracle.

Small shapes, one to three sequences: what a GPU is for, `test_*_sm90.py` have it. Extremes are the
GPU tests' own.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import quantize
from pallas_kernels import (
    DenseDecodeConfig,
    SparseAttentionConfig,
    cache_write_sm90,
    dense_decode_sm90,
    hopper,
    sparse_attention_sm90,
)
from pallas_kernels.warpgroup_attention_sm90 import WarpgroupAttention
from tests import oracle
from tests import test_dense_decode_sm90 as dense
from tests import test_sparse_decode_sm90 as sparse
from tests.emulator import emulated
from tests.helpers import assert_attention_close, load_flashmla, random_latents

FEW = SparseAttentionConfig(8)


def run_sparse(q, cache, indices, *, seed=0, sm_scale=sparse.SM_SCALE, **options):
    with emulated(seed):
        out, lse = sparse_attention_sm90(
            q, jnp.asarray(cache), jnp.asarray(indices), sm_scale=sm_scale, **options
        )
    return np.asarray(out), np.asarray(lse)


def run_dense(q, cache, table, lens, *, seed=0, sm_scale=dense.SM_SCALE, **options):
    arrays = map(jnp.asarray, (cache, table, lens))
    with emulated(seed):
        out, lse = dense_decode_sm90(q, *arrays, sm_scale=sm_scale, **options)
    return np.asarray(out), np.asarray(lse)


@pytest.fixture(autouse=True)
def gpu_tests_run_on_the_emulator(monkeypatch):
    """Their `run` and `check`, too; once, since other interleavings have their own tests."""
    monkeypatch.setattr(sparse, "run", run_sparse)
    monkeypatch.setattr(dense, "run", run_dense)


def assert_bitwise_equal(results):
    (out, lse), *others = results
    for other_out, other_lse in others:
        np.testing.assert_array_equal(out.view(np.uint16), other_out.view(np.uint16))
        np.testing.assert_array_equal(lse.view(np.uint32), other_lse.view(np.uint32))


# --------------------------------------------------------------------------------------- sparse


def sparse_problem(rng, heads, topk, tokens=3):
    """Masked slots, lengths, a token without a key; what is not named is NaN, or junk."""
    rows = sparse.random_rows(rng, 5 * 61)
    used = rng.permutation(len(rows))[:200]
    unused = np.setdiff1d(np.arange(len(rows)), used)
    rows[unused] = sparse.NAN_BYTE
    indices = rng.choice(used, (tokens, topk)).astype(np.int32)
    indices[rng.random(indices.shape) < 0.2] = -1
    indices[0, 3] = 2**31 - 1
    lens = rng.integers(topk // 2, topk, tokens).astype(np.int32)
    lens[-1] = 0
    beyond = np.arange(topk) >= lens[:, None]
    indices[beyond] = rng.choice(unused, beyond.sum())
    options = {
        "attn_sink": jnp.asarray(rng.normal(size=heads) * 3 + 2, jnp.float32),
        "topk_lens": jnp.asarray(lens),
    }
    q = sparse.random_queries(rng, tokens, heads)
    return (q, rows.reshape(5, 61, sparse.ROW), indices), options


@pytest.mark.parametrize(
    ("heads", "topk", "config"),
    [
        (8, 200, SparseAttentionConfig(8, 1, 2, 2)),
        (13, 100, SparseAttentionConfig(8, 3, 1, 4)),
        (16, 150, SparseAttentionConfig(16, 1, 2, 2)),
        (24, 150, SparseAttentionConfig(24, 1, 1, 2)),
        (29, 150, SparseAttentionConfig(32, 1, 2, 1)),
        (64, 300, SparseAttentionConfig(64, 1, 3, 3)),
        (41, 300, SparseAttentionConfig(64, 2, 3, 3)),
    ],
    ids=lambda x: sparse.config_id(x) if isinstance(x, SparseAttentionConfig) else None,
)
def test_sparse_attention(heads, topk, config):
    arguments, options = sparse_problem(np.random.default_rng(heads), heads, topk)
    sparse.check(*arguments, **options, config=config)


@pytest.mark.parametrize(
    ("name", "heads", "config"),
    [
        ("sparse_decode_h64", None, sparse.WIDE),
        ("sparse_decode_h64_page61_invalid", 8, FEW),
    ],
)
def test_flashmla_s_own_outputs(name, heads, config):
    sparse.test_flashmla_s_own_outputs(name, heads, config)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
def test_growing_scores_in_any_interleaving(config):
    """Keys sorted by score: every tile outgrows the maxima, and warps wait for each other most."""
    rng = np.random.default_rng(9)
    rows = sparse.random_rows(rng, 448)
    q = sparse.random_queries(rng, 1, config.head_tile, size=6.0)
    scores = np.asarray(q[0, 0], np.float64) @ oracle.fp8_rows(rows).T
    indices = np.argsort(scores)[None].astype(np.int32)
    cache = rows.reshape(7, 64, sparse.ROW)
    assert_bitwise_equal(
        [sparse.check(q, cache, indices, config=config, seed=seed) for seed in range(3)]
    )


@pytest.mark.parametrize("barrier", ["warpgroup_sync", "wait_for_rows"])
def test_without_one_of_its_barriers_the_kernel_fails(monkeypatch, barrier):
    """So the schedules that the tests try are good for something."""
    monkeypatch.setattr(WarpgroupAttention, barrier, lambda self, *_: None)
    with pytest.raises(AssertionError):
        test_growing_scores_in_any_interleaving(sparse.WIDE)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
@pytest.mark.parametrize(("score", "sign"), [(1.4 * 2.0**27, -1), (2.0**108, 1)])
def test_one_key_of_enormous_score_is_still_a_key(score, sign, config):
    sparse.test_one_key_of_enormous_score_is_still_a_key(score, sign, config)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
def test_enormous_scores_whose_difference_float32_hardly_holds(config):
    sparse.test_enormous_scores_whose_difference_float32_hardly_holds(config)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
def test_tokens_without_weight_do_not_cost_the_others_their_bits(config):
    sparse.test_tokens_without_weight_do_not_cost_the_others_their_bits(config)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
@pytest.mark.parametrize("factor", [2.0**60, np.nan])
def test_what_one_head_s_query_is_does_not_change_the_others(factor, config):
    sparse.test_what_one_head_s_query_is_does_not_change_the_others(factor, config)


@pytest.mark.parametrize("config", [FEW, sparse.WIDE], ids=sparse.config_id)
@pytest.mark.parametrize(
    ("size", "outlier", "sm_scale"),
    [
        (2.0**-1, 3e38, sparse.SM_SCALE),
        (2.0**-40, 3e38, sparse.SM_SCALE),
        (2.0**-114, 2.0**-74, 2.0**109),
    ],
)
def test_queries_far_below_another_head_s(size, outlier, sm_scale, config):
    sparse.test_queries_far_below_another_head_s(size, outlier, sm_scale, config)


def test_queries_of_bfloat16_s_range():
    sparse.test_queries_of_bfloat16_s_range(64, 2.0**-30)


def test_lists_one_behind_the_other(monkeypatch):
    """More parts of the work than CTAs: rows and queries are gathered beyond the end of a part."""
    arguments, options = sparse_problem(np.random.default_rng(3), 150, 200)
    options["config"] = sparse.WIDE
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "NUM_SMS", 2)
        results = [sparse.check(*arguments, **options, seed=seed) for seed in range(3)]
    # The same as where each part has a CTA of its own.
    assert_bitwise_equal([*results, run_sparse(*arguments, **options)])


def test_a_query_of_zeros_averages():
    sparse.test_a_query_of_zeros_averages(2.0**-40, sparse.WIDE)


def test_token_scales_from_tiny_to_large():
    sparse.test_token_scales_from_tiny_to_large(64, -13, 6, True)


# ---------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize(
    ("heads", "q_len", "lens", "page_size", "config"),
    [
        (8, 1, (1, 0, 260), 16, DenseDecodeConfig(8, 3, 2, 2, 1)),
        (5, 3, (1, 0, 150), 61, DenseDecodeConfig(16, 2, 1, 2, 0)),
        (20, 1, (0, 150), 64, DenseDecodeConfig(24, 2, 2, 2, 1)),
        (32, 1, (100, 30), 64, DenseDecodeConfig(32, 1, 1, 3, 1)),
        (8, 1, (1, 0, 260), 61, DenseDecodeConfig(8, 3, 2, 1, 1, "bfloat16")),
        (5, 3, (2, 100), 2, DenseDecodeConfig(16, 2, 1, 2, 0, "bfloat16")),
        (20, 1, (0, 150), 16, DenseDecodeConfig(24, 2, 2, 1, 1, "bfloat16")),
        (32, 1, (100, 30), 64, DenseDecodeConfig(32, 1, 1, 2, 1, "bfloat16")),
        (12, 3, (2, 200), 61, DenseDecodeConfig(64, 3, 3, 3, 1)),
    ],
    ids=lambda x: dense.config_id(x) if isinstance(x, DenseDecodeConfig) else None,
)
def test_dense_decode(heads, q_len, lens, page_size, config):
    """Cut sequences and whole ones, empty ones, drafts; NaN beyond every length."""
    rng = np.random.default_rng(heads)
    cache, table = dense.random_pages(rng, lens, page_size, kv_cache_format=config.kv_cache_format)
    sink = jnp.asarray(rng.normal(size=heads) * 3 + 2, jnp.float32)
    q = dense.random_queries(rng, len(lens), q_len, heads)
    dense.check(q, cache, table, lens, attn_sink=sink, config=config)


def test_flashmla_s_own_dense_outputs():
    data = load_flashmla("dense_decode_h16_causal")
    arrays = (data[name] for name in ("kv_cache", "block_table", "cache_seqlens"))
    config = DenseDecodeConfig(32, 1, 2, 1, 1, "bfloat16")
    q = jnp.asarray(data["q"])
    out, lse = run_dense(q, *arrays, sm_scale=data["sm_scale"], config=config)
    assert_attention_close(out, lse, data["out"], data["lse"])


@pytest.mark.parametrize(
    "config",
    [
        DenseDecodeConfig(16, 2, 2, 1, 1, "bfloat16"),
        DenseDecodeConfig(64, 1, 3, 3, 0),
    ],
    ids=dense.config_id,
)
def test_dense_decode_does_not_depend_on_the_interleaving(config):
    """The CTA's second sequence meets what the first has left."""
    rng = np.random.default_rng(1)
    lens = np.asarray([140, 100], np.int32)
    cache, table = dense.random_pages(rng, lens, 64, kv_cache_format=config.kv_cache_format)
    q = dense.random_queries(rng, 2, 1, 8)
    assert_bitwise_equal(
        [dense.check(q, cache, table, lens, config=config, seed=seed) for seed in range(3)]
    )


# ---------------------------------------------------------------------------------- cache write


@pytest.mark.parametrize("scale_format", ["power_of_two", "exact"])
def test_cache_write(scale_format):
    """Bit for bit what the XLA implementation writes, and nothing else."""
    kv_c, k_pe = random_latents(np.random.default_rng(0), 7)
    cache = jnp.full((2, 64, dense.ROW), dense.NAN_BYTE, jnp.uint8)
    slots = np.asarray([3, -1, 127, 128, 64, 0, 5], np.int32)
    with emulated():
        written = cache_write_sm90(cache, kv_c, k_pe, jnp.asarray(slots), scale_format=scale_format)
    expected = np.asarray(cache).reshape(128, dense.ROW).copy()
    valid = (slots >= 0) & (slots < 128)
    expected[slots[valid]] = np.asarray(quantize(kv_c, k_pe, scale_format=scale_format))[valid]
    np.testing.assert_array_equal(np.asarray(written).reshape(128, dense.ROW), expected)
