import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mla_jax.indexer
import mla_jax.modules
from mla_jax import LatentCache, allocate_pages
from mla_jax.indexer import select_keys
from mla_jax.modules import (
    IndexerConfig,
    MLAConfig,
    MultiHeadLatentAttention,
    SparseCache,
    SparseMultiHeadLatentAttention,
)
from tests.huggingface import CASES, expected, load, make_mesh

CONFIG = MLAConfig(
    hidden_size=48, num_heads=8, q_lora_rank=24, kv_lora_rank=128, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=12,
)  # fmt: skip
SPARSE_CONFIG = dataclasses.replace(
    CONFIG, indexer=IndexerConfig(num_heads=4, head_dim=16, topk=8, rope_interleaved=True)
)
LEN = 20


@functools.cache
def dense():
    return MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def sparse():
    return SparseMultiHeadLatentAttention(SPARSE_CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def call(module, x, cache, **tokens):
    return module(x, cache, **tokens)


def inputs(batch=2, length=LEN, hidden=48):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, length, hidden)), jnp.float32)


def paged(module, batch=2, length=LEN, page_size=4, poison=False):
    """A page table in shuffled order and a float32 cache; poisoned caches start as all NaN."""
    page_indices, num_pages = allocate_pages([length] * batch, page_size)
    shuffled = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    cache = module.init_cache(num_pages, page_size, format="float32")
    if poison:
        cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    return jnp.asarray(shuffled[page_indices]), cache


def lens(*values):
    return jnp.array(values, jnp.int32)


@pytest.mark.parametrize("case", CASES)
def test_attention_layer_agrees_with_transformers(case):
    data = expected(case)
    layer = load(case).layers[0].self_attn
    page_indices, num_pages = allocate_pages([40, 40], 16)
    cache = layer.init_cache(num_pages, 16, format="float32")
    out, *_ = call(
        layer,
        jnp.asarray(data["attn0_in"]),
        cache,
        page_indices=jnp.asarray(page_indices),
        kv_lens=lens(40, 40),
    )
    scale = np.abs(data["attn0_out"]).max()
    np.testing.assert_allclose(out, data["attn0_out"], atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("q_len", [1, 3, 7], ids=["decode", "drafts", "chunks-of-7"])
def test_any_split_of_a_sequence_gives_the_same(make, q_len):
    module, x = make(), inputs()
    page_indices, cache = paged(module)
    whole, *_ = call(module, x, cache, page_indices=page_indices, kv_lens=lens(LEN, LEN))
    # The first chunk is padded in front: positions below 0.
    padding = -LEN % q_len
    padded = jnp.pad(x, ((0, 0), (padding, 0), (0, 0)), constant_values=1e4)
    page_indices, cache = paged(module, poison=True)
    outs = []
    for start in range(0, LEN + padding, q_len):
        out, cache, *_ = call(
            module,
            padded[:, start : start + q_len],
            cache,
            page_indices=page_indices,
            kv_lens=lens(*[start + q_len - padding] * 2),
        )
        outs.append(out)
    np.testing.assert_allclose(
        jnp.concatenate(outs, axis=1)[:, padding:], whole, atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("make", [dense, sparse])
def test_ragged_prefill_agrees_with_equal_lengths(make):
    module, x = make(), inputs()
    page_indices, cache = paged(module)
    kv_lens = lens(LEN, LEN)
    whole, cache, *_ = call(module, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    # Sequence 0 has 13 tokens in the cache already, sequence 1 none; then three tokens of padding.
    _, ragged_cache = paged(module, poison=True)
    _, ragged_cache, *_ = call(
        module, x[:, :13], ragged_cache, page_indices=page_indices, kv_lens=lens(13, 0)
    )
    tokens = jnp.concatenate([x[0, 13:], x[1], jnp.full((3, 48), 1e4)])
    out, ragged_cache, *_ = call(
        module,
        tokens,
        ragged_cache,
        page_indices=page_indices,
        kv_lens=kv_lens,
        cu_q_lens=lens(0, LEN - 13, 2 * LEN - 13),
    )
    want = jnp.concatenate([whole[0, 13:], whole[1]])
    np.testing.assert_allclose(out[:-3], want, atol=2e-5, rtol=2e-5)
    assert np.isfinite(out).all()
    for have, want in zip(jax.tree.leaves(ragged_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("make", [dense, sparse])
def test_sequences_of_length_zero_write_nothing_and_stay_finite(make):
    module = make()
    page_indices, cache = paged(module, poison=True)
    out, after, *_ = call(
        module, inputs(length=2), cache, page_indices=page_indices, kv_lens=lens(0, 0)
    )
    assert np.isfinite(out).all()
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(after))


def test_absorption_equals_the_plain_form():
    """w_uk and w_uv are the halves of kv_b_proj, head by head."""
    module, x = dense(), inputs(batch=1, length=1)
    page_indices, cache = paged(module, batch=1)
    out, cache = call(module, x, cache, page_indices=page_indices, kv_lens=lens(1))
    # With a single key the softmax is 1: out = o_proj(v).
    kv_c = cache.gather(page_indices[:, 0] * 4)[:, :128]
    v = module.kv_b_proj(kv_c).reshape(8, 16 + 12)[:, 16:].reshape(1, -1)
    np.testing.assert_allclose(out[0], module.o_proj(v), atol=1e-5)
    assert module.w_uk.shape == (128, 8, 16)
    assert module.w_uv.shape == (128, 8, 12)


@pytest.mark.parametrize("form", ["equal", "equal, in blocks", "ragged"])
@pytest.mark.parametrize("overrun", [0, 1, 30])
def test_indexer_selects_the_best_past_keys(form, overrun, monkeypatch):
    monkeypatch.setattr(mla_jax.indexer, "_MAX_KEY_CHUNK", 8)
    monkeypatch.setattr(mla_jax.indexer, "_MIN_KEY_CHUNK", 8)
    monkeypatch.setattr(mla_jax.indexer, "_QUERY_CHUNK", 6)
    if form == "equal, in blocks":  # 3 tokens at a time.
        monkeypatch.setattr(mla_jax.indexer, "_MAX_SCORE_BYTES", 4 * 4 * 8 * 3)
    indexer = sparse().indexer
    rng = np.random.default_rng(0)
    q, weights, k = (
        rng.normal(size=shape).astype(np.float32) for shape in [(LEN, 4, 16), (LEN, 4), (LEN, 16)]
    )
    page_indices, cache = paged(sparse(), batch=1, poison=True)
    pages = np.asarray(page_indices[0])
    slots = pages[np.arange(LEN) // 4] * 4 + np.arange(LEN) % 4
    keys = cache.index_keys.write(jnp.asarray(k), jnp.zeros((LEN, 0)), jnp.asarray(slots))
    select = jax.jit(functools.partial(select_keys, topk=indexer.config.topk))
    # With an overrun the length is beyond the page table: its last tokens see all keys there are.
    kv_lens = jnp.array([LEN + overrun])
    if form == "ragged":
        chosen = select(q, weights, keys, page_indices, kv_lens, jnp.array([0, LEN]))
    else:
        chosen = select(q[None], weights[None], keys, page_indices, kv_lens)
    assert chosen.shape == (LEN, 8)
    scores = np.einsum("thk,th->tk", np.maximum(np.einsum("thd,kd->thk", q, k), 0), weights)
    for t, have in enumerate(np.asarray(chosen)):
        seen = min(overrun + t + 1, LEN)
        want = np.argsort(-scores[t, :seen], kind="stable")[:8]
        assert (have < 0).sum() == max(0, 8 - seen)
        assert set(have[have >= 0]) == set(slots[want])


def test_memory_of_the_indexer_is_bounded():
    """Selecting for 512 tokens among 16,384 keys never holds all per-head scores (137 GB)."""
    keys = LatentCache(jax.ShapeDtypeStruct((256, 64, 16), jnp.float32), 16, 0)
    f = jax.jit(functools.partial(select_keys, topk=8))
    shape = jax.ShapeDtypeStruct
    compiled = f.lower(
        shape((4, 128, 4096, 16), jnp.float32),
        shape((4, 128, 4096), jnp.float32),
        keys,
        shape((4, 256), jnp.int32),
        shape((4,), jnp.int32),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * mla_jax.indexer._MAX_SCORE_BYTES


def test_topk_of_all_keys_is_dense_attention():
    config = dataclasses.replace(
        SPARSE_CONFIG, indexer=dataclasses.replace(SPARSE_CONFIG.indexer, topk=LEN)
    )
    module, x = SparseMultiHeadLatentAttention(config, rngs=nnx.Rngs(0)), inputs()
    page_indices, cache = paged(module)
    kv_lens = lens(LEN, LEN)
    out, *_ = call(module, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    same = dense()
    page_indices, cache = paged(same)
    want, _ = call(same, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)


def test_shared_layers_use_the_indices_that_they_are_given():
    module = SparseMultiHeadLatentAttention(SPARSE_CONFIG, has_indexer=False, rngs=nnx.Rngs(0))
    x, owner = inputs(), sparse()
    kv_lens = lens(LEN, LEN)
    page_indices, cache = paged(owner)
    want, _, chosen = call(owner, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    page_indices, cache = paged(module)
    assert cache.index_keys is None
    out, after, same = call(
        module, x, cache, page_indices=page_indices, kv_lens=kv_lens, topk_indices=chosen
    )
    np.testing.assert_array_equal(same, chosen)
    np.testing.assert_allclose(out, want, atol=1e-5)
    with pytest.raises(ValueError, match="needs topk_indices of an earlier layer"):
        module(x, after, page_indices=page_indices, kv_lens=kv_lens)


def test_index_keys_are_float32_only_beside_float32_latents():
    for format, dtype in [("fp8_ds_mla", "bfloat16"), ("bfloat16",) * 2, ("float32",) * 2]:
        cache = sparse().init_cache(2, format=format)
        assert cache.latent.format == format
        assert cache.index_keys.data.dtype == dtype
        assert cache.bytes_per_token == cache.latent.bytes_per_token + 16 * (
            4 if dtype == "float32" else 2
        )


def test_caches_take_scales_of_either_format():
    assert sparse().init_cache(2).latent.scale_format == "power_of_two"
    assert sparse().init_cache(2, scale_format="exact").latent.scale_format == "exact"


def test_metadata_of_the_kernels_can_be_given():
    mesh = make_mesh(2)
    module = MultiHeadLatentAttention(
        CONFIG,
        mesh=mesh,
        kernel_metadata={"out_sharding": (None, None), "mesh": mesh},
        out_kernel_metadata={"out_sharding": (None, None), "mesh": mesh},
        rngs=nnx.Rngs(0),
    )
    for projection in (module.q_b_proj, module.kv_b_proj, module.o_proj):
        assert projection.kernel.get_metadata("out_sharding") == (None, None)


MESHES = {
    "auto-2": lambda: make_mesh(2),
    "auto-4": lambda: make_mesh(4),
    "auto-8": lambda: make_mesh(8),
    "explicit-8": lambda: make_mesh(8, AxisType.Explicit),
    "auto-2x4": lambda: jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2),
    "explicit-2x4": lambda: jax.make_mesh((2, 4), ("data", "model")),
}


@pytest.mark.parametrize(
    ("mesh_name", "make"),
    [(name, dense) for name in MESHES] + [("auto-8", sparse), ("explicit-2x4", sparse)],
)
def test_tensor_parallelism_gives_the_same_numbers(make, mesh_name):
    x, kv_lens = inputs(), lens(LEN, LEN)
    module = make()
    page_indices, cache = paged(module)
    want, want_cache, *_ = call(module, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    with jax.set_mesh(MESHES[mesh_name]()):
        split = type(module)(module.config, rngs=nnx.Rngs(0))
        assert split.q_b_proj.kernel[...].sharding.spec == P(None, "model")
        assert split.o_proj.kernel[...].sharding.spec == P("model", None)
        page_indices, cache = paged(split)
        out, new_cache, *_ = call(split, x, cache, page_indices=page_indices, kv_lens=kv_lens)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new_cache))
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)
    for have, want in zip(jax.tree.leaves(new_cache), jax.tree.leaves(want_cache), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=2e-5)


def test_eager_calls_on_a_mesh_compile_once(caplog):
    module = SparseMultiHeadLatentAttention(SPARSE_CONFIG, mesh=make_mesh(2), rngs=nnx.Rngs(0))
    page_indices, cache = paged(module)
    tokens = {"page_indices": page_indices, "kv_lens": lens(LEN, LEN)}
    module(inputs(), cache, **tokens)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        module(inputs(), cache, **tokens)
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_requests_can_be_split_over_another_axis():
    """Data parallelism is a shard_map around the layer; each group has a cache of its own."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    module = SparseMultiHeadLatentAttention(SPARSE_CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    x, kv_lens = inputs(batch=4), lens(*[LEN] * 4)
    page_indices, cache = paged(module, batch=4)
    want, *_ = call(module, x, cache, page_indices=page_indices, kv_lens=kv_lens)

    page_indices, num_pages = allocate_pages([LEN] * 2, 4)  # of one group
    graphdef, params = nnx.split(module)

    def group(params, x, cache, page_indices, kv_lens):
        module, tokens = nnx.merge(graphdef, params), {"kv_lens": kv_lens}
        out, cache, _ = module(x, cache, page_indices=page_indices, **tokens)
        return out, cache

    cache = module.init_cache(2 * num_pages, 4, format="float32")
    groups = jax.shard_map(
        group,
        mesh=mesh,
        axis_names={"data"},
        in_specs=(P(), P("data"), P("data"), P("data"), P("data")),
        out_specs=(P("data"), P("data")),
    )
    out, _ = jax.jit(groups)(params, x, cache, jnp.tile(page_indices, (2, 1)), kv_lens)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)


def test_ragged_calls_may_be_padding_only():
    module = sparse()
    tokens = {"page_indices": jnp.zeros((0, 2), jnp.int32), "kv_lens": jnp.zeros(0, jnp.int32)}
    cache = module.init_cache(2, 4, format="float32")
    out, after, _ = module(inputs()[0], cache, cu_q_lens=lens(0), **tokens)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(after.latent.data, cache.latent.data)


def test_an_adapter_on_the_absorbed_projection_is_refused():
    module = MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    module.kv_b_proj = nnx.LoRALinear(128, 8 * 28, lora_rank=2, rngs=nnx.Rngs(0))
    page_indices, cache = paged(module)
    with pytest.raises(ValueError, match=r"kv_b_proj is a LoRALinear.*Merge an adapter"):
        module(inputs(), cache, page_indices=page_indices, kv_lens=lens(LEN, LEN))


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("mesh_name", ["auto-8", "explicit-8"])
def test_caches_can_be_made_under_jit_and_a_mesh(make, mesh_name):
    with jax.set_mesh(MESHES[mesh_name]()):
        module = type(make())(make().config, rngs=nnx.Rngs(0))
        cache = jax.jit(lambda: module.init_cache(4))()
        abstract = jax.eval_shape(lambda: module.init_cache(4))
    for leaf, shape in zip(*map(jax.tree.leaves, (cache, abstract)), strict=True):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def test_a_mesh_can_be_given_and_its_axis_named():
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    module = MultiHeadLatentAttention(CONFIG, mesh=mesh, head_axis="tp", rngs=nnx.Rngs(0))
    assert module.kv_b_proj.kernel[...].sharding.spec == P(None, "tp")
    x, kv_lens = inputs(), lens(LEN, LEN)
    page_indices, cache = paged(module)
    out, _ = call(module, x, cache, page_indices=page_indices, kv_lens=kv_lens)
    page_indices, cache = paged(dense())
    want, _ = call(dense(), x, cache, page_indices=page_indices, kv_lens=kv_lens)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)


def test_without_a_mesh_sharding_is_metadata_only():
    flat = dict(nnx.to_flat_state(nnx.get_partition_spec(nnx.state(dense()))))
    specs = {path[0]: spec.get_raw_value() for path, spec in flat.items()}
    assert specs["q_b_proj"] == specs["kv_b_proj"] == P(None, "model")
    assert specs["o_proj"] == P("model", None)
    assert specs["q_a_proj"] == specs["kv_a_layernorm"] == P(None)


def test_the_attention_all_reduce_is_the_only_communication():
    mesh = make_mesh(8)
    module = MultiHeadLatentAttention(CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    page_indices, cache = paged(module)
    graphdef, params = nnx.split(module)

    def f(params, x, cache):
        tokens = {"page_indices": page_indices, "kv_lens": lens(5, 5)}
        return nnx.merge(graphdef, params)(x, cache, **tokens)

    hlo = jax.jit(f).lower(params, inputs(length=1), cache).compile().as_text()
    collectives = ["all-reduce(", "all-gather(", "all-to-all(", "collective-permute("]
    assert [hlo.count(name) for name in collectives] == [1, 0, 0, 0]


def test_dtype_and_param_dtype():
    module = MultiHeadLatentAttention(
        CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    same_values = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(dense()))
    nnx.update(module, same_values)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("bfloat16")}
    page_indices, num_pages = allocate_pages([LEN, LEN], 4)
    cache = module.init_cache(num_pages, 4)
    x = inputs().astype(jnp.bfloat16)
    out, _ = call(module, x, cache, page_indices=jnp.asarray(page_indices), kv_lens=lens(LEN, LEN))
    assert out.dtype == jnp.bfloat16
    page_indices, cache = paged(dense())
    want, _ = call(dense(), inputs(), cache, page_indices=page_indices, kv_lens=lens(LEN, LEN))
    assert np.abs(out - want).max() < 0.1 * np.abs(want).max()


def test_mistakes_are_named():
    module, x = dense(), inputs()
    page_indices, cache = paged(module)
    tokens = {"page_indices": page_indices, "kv_lens": lens(LEN, LEN)}
    with pytest.raises(ValueError, match=r"x\.shape=\(20, 48\) must be \[batch, q_len, hidden\]"):
        module(x[0], cache, **tokens)
    with pytest.raises(ValueError, match="hidden_size=48"):
        module(x[..., :40], cache, **tokens)
    with pytest.raises(ValueError, match=r"cache\.kv_lora_rank=512.*self\.init_cache"):
        module(x, LatentCache.init(4), **tokens)
    with pytest.raises(ValueError, match="agree on the batch size"):
        module(x[:1], cache, **tokens)
    with pytest.raises(ValueError, match=r"cu_q_lens\.shape=\(2,\) must be \[batch \+ 1\]"):
        module(x[0], cache, cu_q_lens=lens(0, LEN), **tokens)
    with pytest.raises(ValueError, match="cache is a LatentCache"):
        sparse()(x, cache, **tokens)
    with pytest.raises(ValueError, match="x=None must be an array"):
        module(None, cache, **tokens)
    with pytest.raises(ValueError, match="implementation='cuda' must be None or one of"):
        MultiHeadLatentAttention(CONFIG, implementation="cuda", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads=8 is not divisible by the 3 devices"):
        MultiHeadLatentAttention(CONFIG, mesh=make_mesh(3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="axis 'heads' is not an axis of the mesh"):
        MultiHeadLatentAttention(CONFIG, mesh=make_mesh(2), head_axis="heads", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads=0 must be a positive integer"):
        MLAConfig(hidden_size=8, num_heads=0)
    with pytest.raises(ValueError, match=r"num_heads=2\.5 must be a positive integer"):
        MLAConfig(hidden_size=8, num_heads=2.5)
    with pytest.raises(ValueError, match="q_lora_rank=None with an indexer"):
        MLAConfig(hidden_size=8, num_heads=1, indexer=IndexerConfig(4))
    with pytest.raises(ValueError, match="needs both"):
        SparseMultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    _, sparse_cache = paged(sparse())
    with pytest.raises(ValueError, match="own init_cache"):
        sparse()(x, SparseCache(sparse_cache.latent, None), **tokens)
    index_keys = sparse_cache.index_keys
    other = dataclasses.replace(index_keys, data=index_keys.data[:, :-1])
    with pytest.raises(ValueError, match="must have the same pages"):
        sparse()(x, SparseCache(sparse_cache.latent, other), **tokens)


def test_linen_users_reach_it_through_the_bridge():
    linen = nnx.bridge.to_linen(MultiHeadLatentAttention, CONFIG)
    x, kv_lens = inputs(), lens(LEN, LEN)
    page_indices, cache = paged(dense())
    tokens = {"page_indices": page_indices, "kv_lens": kv_lens}
    variables = linen.init(jax.random.key(0), x, cache, **tokens)
    (out, new_cache) = jax.jit(linen.apply)(variables, x, cache, **tokens)
    assert out.shape == x.shape
    assert isinstance(new_cache, LatentCache)
    assert set(variables["params"]) == set(nnx.state(dense()))


def test_docstring_examples():
    assert doctest.testmod(mla_jax.modules).failed == 0


@pytest.mark.parametrize("module", [dense, sparse])
@pytest.mark.parametrize(("name", "dtype"), [("page_indices", np.int16), ("kv_lens", np.uint8)])
def test_index_arguments_are_int32(module, name, dtype):
    """Others wrap around: an empty row's position -1 would be 255."""
    page_indices, cache = paged(module())
    tokens = {"page_indices": page_indices, "kv_lens": np.full(2, LEN, np.int32)}
    tokens[name] = np.asarray(tokens[name]).astype(dtype)
    with pytest.raises(ValueError, match=rf"{name}\.dtype={np.dtype(dtype).name} must be int32"):
        module()(inputs(), cache, **tokens)


@pytest.mark.parametrize("module", [dense, sparse])
def test_a_ragged_call_takes_numpy_indices_under_jit(module):
    page_indices, cache = paged(module())
    tokens = {
        "page_indices": np.asarray(page_indices),
        "kv_lens": np.asarray([LEN, 5], np.int32),
        "cu_q_lens": np.asarray([0, LEN, LEN + 5], np.int32),
    }
    x = inputs(batch=1, length=LEN + 5)[0]
    inside = nnx.jit(lambda module, x, cache: module(x, cache, **tokens)[0])(module(), x, cache)
    as_arguments = call(module(), x, cache, **jax.tree.map(jnp.asarray, tokens))[0]
    np.testing.assert_allclose(inside, as_arguments, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [dense, sparse])
def test_no_new_tokens_is_a_call(module):
    page_indices, cache = paged(module())
    out, *_ = module()(
        inputs()[:, :0], cache, page_indices=page_indices, kv_lens=jnp.zeros(2, jnp.int32)
    )
    assert out.shape == (2, 0, CONFIG.hidden_size)


@pytest.mark.parametrize("module", [dense, sparse])
def test_modules_with_64_bit_types_enabled(module):
    page_indices, cache = paged(module())
    tokens = {"page_indices": page_indices, "kv_lens": lens(LEN, LEN)}
    expected = module()(inputs(), cache, **tokens)[0]
    with jax.enable_x64(True):
        out = module()(inputs(), cache, **tokens)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
