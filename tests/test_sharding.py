"""The shard_map wrapper on eight simulated devices: same numbers, whatever the mesh."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_jax import mla_decode, mla_prefill, mla_sparse_attention, tensor_parallel
from pallas_kernels.dense_decode_sm90 import default_config as dense_config
from pallas_kernels.sparse_decode_sm90 import default_config as sparse_config
from tests.helpers import assert_attention_close, random_q
from tests.test_attention import filled_cache, paged_batch

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
HEADS = 16


def cases(heads, topk=24):
    """Each op with arguments of so many heads: name -> (op, arrays, keyword arrays)."""
    rng = np.random.default_rng(0)
    cache = filled_cache(rng, 4, 16)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    indices = jnp.asarray(rng.integers(-1, 64, (4, topk)), jnp.int32)
    sparse = (random_q(rng, 4, heads, 576), cache, indices)
    topk_lens = jnp.array([topk, 3, 0, 7], jnp.int32)
    paged, table = paged_batch(rng, np.array([40, 3, 0, 17]), 16)
    lens = jnp.array([40, 3, 0, 17], jnp.int32)
    cu_q_lens = jnp.array([0, 6, 8, 8, 12], jnp.int32)
    return {
        "sparse": (mla_sparse_attention, sparse, {"attn_sink": sink, "topk_lens": topk_lens}),
        "sparse-array": (mla_sparse_attention, (sparse[0], cache.data, indices), {}),
        "decode": (
            mla_decode,
            (random_q(rng, 4, 2, heads, 576), paged, table, lens),
            {"attn_sink": sink},
        ),
        "prefill": (
            mla_prefill,
            (random_q(rng, 12, heads, 576), paged, table, lens, cu_q_lens),
            {"attn_sink": sink},
        ),
    }


CASES = cases(HEADS)


def make_mesh(shape, names, axis_types):
    devices = jax.devices()[: int(np.prod(shape))]
    if not isinstance(axis_types, tuple):
        axis_types = (axis_types,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=devices)


def check_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-6
        )


@functools.cache
def expected_of(name):
    op, args, kwargs = CASES[name]
    return op(*args, sm_scale=0.07, return_lse=True, **kwargs)


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_on_any_number_of_devices(name, num_devices, axis_type):
    op, args, kwargs = CASES[name]
    mesh = make_mesh((num_devices,), ("heads",), axis_type)
    sharded = tensor_parallel(op, mesh=mesh, head_axis="heads")
    got = jax.jit(lambda *a: sharded(*a, sm_scale=0.07, return_lse=True, **kwargs))(*args)
    check_equal(got, expected_of(name))
    shard = got[0].addressable_shards[0].data
    assert shard.shape[-2] == HEADS // num_devices


@pytest.mark.parametrize(
    "axis_types",
    list(itertools.product(AXIS_TYPES, AXIS_TYPES)),
    ids=lambda types: "-".join(t.name for t in types),
)
@pytest.mark.parametrize("name", ["sparse", "decode"])
def test_batch_over_a_second_axis(name, axis_types):
    op, args, kwargs = CASES[name]
    mesh = make_mesh((2, 4), ("data", "model"), axis_types)
    sharded = tensor_parallel(op, mesh=mesh, batch_axis="data")
    got = sharded(*args, sm_scale=0.07, return_lse=True, **kwargs)
    check_equal(got, expected_of(name))
    assert got[0].addressable_shards[0].data.shape[0] == 2


@pytest.mark.parametrize("name", CASES)
def test_forced_padding_happens_per_device_and_does_not_show(name):
    op, args, kwargs = CASES[name]
    mesh = make_mesh((8,), ("model",), AxisType.Auto)
    sharded = tensor_parallel(op, mesh=mesh, pad_heads=True)
    fn = jax.jit(lambda *a: sharded(*a, sm_scale=0.07, return_lse=True, **kwargs))
    check_equal(fn(*args), expected_of(name))
    per_device = str(jax.make_jaxpr(fn)(*args))
    q_shape = args[0].shape
    local = ",".join(map(str, (*q_shape[:-2], 64, q_shape[-1])))
    assert f"bf16[{local}]" in per_device


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=lambda t: t.name)
def test_mesh_from_context_and_inputs_already_placed(axis_type):
    op, args, kwargs = CASES["decode"]
    mesh = make_mesh((8,), ("model",), axis_type)
    q = jax.device_put(args[0], NamedSharding(mesh, P(None, None, "model", None)))
    rest = jax.device_put(args[1:], NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *a: tensor_parallel(op)(*a, sm_scale=0.07, return_lse=True, **kwargs))(
            q, *rest
        )
    check_equal(got, expected_of("decode"))


def test_attention_itself_does_not_communicate():
    op, args, _ = CASES["decode"]
    mesh = make_mesh((8,), ("model",), AxisType.Auto)
    q = jax.device_put(args[0], NamedSharding(mesh, P(None, None, "model", None)))
    rest = jax.device_put(args[1:], NamedSharding(mesh, P()))
    sharded = tensor_parallel(op, mesh=mesh)
    text = jax.jit(lambda *a: sharded(*a, sm_scale=0.07)).lower(q, *rest).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_without_lse_and_by_keyword():
    op, args, _ = CASES["sparse"]
    mesh = make_mesh((8,), ("model",), AxisType.Auto)
    q, cache, indices = args
    out = tensor_parallel(op, mesh=mesh)(
        topk_indices=indices, kv_cache=cache, q=q, sm_scale=0.07, implementation="xla"
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32),
        np.asarray(op(q, cache, indices, sm_scale=0.07), np.float32),
        rtol=1e-2,
    )


def call(name="sparse", shape=(8,), names=("model",), q=None, **options):
    op, args, _ = CASES[name]
    mesh = make_mesh(shape, names, AxisType.Auto)
    args = args if q is None else (q, *args[1:])
    of_op = {k: options.pop(k) for k in ("attn_sink", "implementation") if k in options}
    return tensor_parallel(op, **{"mesh": mesh, **options})(*args, sm_scale=0.07, **of_op)


def test_signature_is_the_ops_own():
    sharded = tensor_parallel(mla_decode)
    assert inspect.signature(sharded) == inspect.signature(mla_decode)
    assert sharded.__doc__ == mla_decode.__doc__


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=lambda t: t.name)
def test_calls_outside_of_jit_compile_once(axis_type, caplog):
    op, args, _ = CASES["decode"]
    sharded = tensor_parallel(op, mesh=make_mesh((8,), ("model",), axis_type))
    sharded(*args, sm_scale=0.07)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        sharded(*args, sm_scale=0.07)
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_equal_wrappers_share_their_programs(caplog):
    op, args, _ = CASES["decode"]
    mesh = make_mesh((8,), ("model",), AxisType.Auto)
    tensor_parallel(op, mesh=mesh)(*args, sm_scale=0.07)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        tensor_parallel(op, mesh=mesh)(*args, sm_scale=0.07)
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_arguments_are_checked_before_they_are_traced():
    _, (q, cache, table, _), _ = CASES["decode"]
    decode = tensor_parallel(mla_decode, mesh=make_mesh((8,), ("model",), AxisType.Auto))
    with pytest.raises(ValueError, match="kv_lens holds 4294967298, which is no int32"):
        decode(q, cache, table, np.array([2**32 + 2, 4, 1, 1]), sm_scale=0.07)
    with pytest.raises(ValueError, match=r"page_indices=\[\[0\]\] must be an array"):
        decode(q, cache, [[0]], jnp.ones(4, jnp.int32), sm_scale=0.07)


def test_errors_name_argument_and_remedy():
    with pytest.raises(ValueError, match="12, is not divisible by the 8 devices of head_axis"):
        call(q=CASES["sparse"][1][0][:, :12])
    with pytest.raises(ValueError, match="head_axis='tensor' is not an axis of the mesh"):
        call(head_axis="tensor")
    with pytest.raises(ValueError, match="batch_axis='data' is not an axis of the mesh"):
        call(batch_axis="data")
    with pytest.raises(ValueError, match="cannot be split"):
        call("prefill", (2, 4), ("data", "model"), batch_axis="data")
    with pytest.raises(ValueError, match="no mesh in context"):
        call(mesh=None)
    with pytest.raises(ValueError, match="more than 128"):
        call(shape=(1,), q=jnp.zeros((4, 136, 576), jnp.bfloat16))
    with pytest.raises(ValueError, match="must be mla_sparse_attention, mla_decode or mla_prefill"):
        tensor_parallel(jnp.add)
    with pytest.raises(ValueError, match="must be different axes"):
        call(head_axis="model", batch_axis="model")
    with pytest.raises(ValueError, match=r"attn_sink.shape=\(8,\) must be \(16,\)"):
        call(attn_sink=jnp.zeros(8))
    with pytest.raises(ValueError, match=r"topk_indices.shape=\(4, 24\) must be \[tokens, topk\]"):
        call(shape=(2, 4), names=("data", "model"), batch_axis="data", q=jnp.zeros((6, 16, 576)))
    with pytest.raises(ValueError, match="implementation='cuda'"):
        call(implementation="cuda")
    with pytest.raises(ValueError, match=r"dimension 0, 4, is not divisible by the 8 devices"):
        call(shape=(8, 1), names=("data", "model"), batch_axis="data")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("name", ["sparse", "decode"])
def test_padded_to_the_64_tile_equals_native_on_a_gpu(name, heads):
    """140 sequences: enough for both kernels to take 64 padded heads as such."""
    rng = np.random.default_rng(heads)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    if name == "sparse":
        assert sparse_config(140, 64, 300).head_tile == 64
        cache = filled_cache(rng, 40, 16)
        indices = jnp.asarray(rng.integers(-1, cache.num_slots, (140, 300)), jnp.int32)
        op, arrays = mla_sparse_attention, (random_q(rng, 140, heads, 576), cache, indices)
    else:
        assert dense_config(140, 64, 208).head_tile == 64
        lens = rng.integers(0, 200, 140)
        cache, table = paged_batch(rng, lens, 16)
        q = random_q(rng, 140, 1, heads, 576)
        op, arrays = mla_decode, (q, cache, table, jnp.asarray(lens, jnp.int32))
    options = {"sm_scale": 0.07, "attn_sink": sink, "return_lse": True}
    options["implementation"] = "mosaic_gpu"
    mesh = make_mesh((1,), ("model",), AxisType.Auto)
    native = op(*arrays, **options)
    padded = tensor_parallel(op, mesh=mesh, pad_heads=True)(*arrays, **options)
    assert_attention_close(*padded, *(np.asarray(x, np.float64) for x in native))
