"""Who runs when: on a CPU machine that pretends to sit beside a Hopper GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import LatentCache, dispatch, mla_decode, mla_sparse_attention
from tests.helpers import assert_attention_close, random_latents, random_q


def xla(x):
    return jnp.sin(x)


def kernel(x):
    return jnp.cos(x)


def cannot():
    raise NotImplementedError("no such kernel")


def lowered(platform, implementation=None, mosaic_gpu=lambda: kernel):
    fn = jax.jit(lambda x: dispatch.dispatch(implementation, xla, mosaic_gpu, x))
    return fn.trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "runs_on_hopper", lambda: True)


def test_no_gpu_means_xla():
    assert not dispatch.runs_on_hopper()
    assert "stablehlo.sine" in lowered("cpu")


@pytest.mark.usefixtures("hopper")
def test_hopper_takes_the_kernel_and_only_the_kernel():
    text = lowered("cuda")
    assert "stablehlo.cosine" in text
    assert "stablehlo.sine" not in text


@pytest.mark.usefixtures("hopper")
def test_a_program_for_the_cpu_of_a_hopper_machine_takes_xla():
    text = lowered("cpu")
    assert "stablehlo.sine" in text
    assert "stablehlo.cosine" not in text
    assert float(dispatch.dispatch(None, xla, lambda: kernel, jnp.zeros(()))) == 0.0


@pytest.mark.usefixtures("hopper")
def test_none_falls_back_where_the_kernel_cannot():
    assert "stablehlo.sine" in lowered("cuda", mosaic_gpu=cannot)

    def cannot_once_it_sees_the_shapes(x):
        raise NotImplementedError(f"{x.shape=}")

    assert "stablehlo.sine" in lowered("cuda", mosaic_gpu=lambda: cannot_once_it_sees_the_shapes)


def test_named_implementations_are_obeyed():
    assert "stablehlo.cosine" in lowered("cpu", "mosaic_gpu")
    assert "stablehlo.sine" in lowered("cuda", "xla")
    with pytest.raises(NotImplementedError, match="no such kernel"):
        dispatch.dispatch("mosaic_gpu", xla, cannot, jnp.ones(3))
    with pytest.raises(ValueError, match="implementation='triton' must be None or one of"):
        dispatch.dispatch("triton", xla, cannot, jnp.ones(3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
@pytest.mark.usefixtures("hopper")
def test_kernels_have_no_gradients(implementation):
    def loss(x):
        return dispatch.dispatch(implementation, xla, lambda: kernel, x).sum()

    with pytest.raises(NotImplementedError, match="kernels have no gradients; use impl"):
        jax.jit(jax.grad(loss)).trace(jnp.ones(3))


def attend_and_write(implementation, kv_c, k_pe, slots, q, cache, indices):
    cache = cache.write(kv_c, k_pe, slots, implementation=implementation)
    out, lse = mla_sparse_attention(
        q, cache, indices, sm_scale=0.07, return_lse=True, implementation=implementation
    )
    return out, lse, cache


def operands(format="fp8_ds_mla"):
    rng = np.random.default_rng(0)
    cache = LatentCache.init(4, 64, format=format)
    cache = cache.write(*random_latents(rng, 256), jnp.arange(256), implementation="xla")
    indices = jnp.asarray(rng.integers(-1, 256, (3, 40)), jnp.int32)
    slots = jnp.array([5, -1, 80], jnp.int32)
    return (*random_latents(rng, 3), slots, random_q(rng, 3, 8, 576), cache, indices)


def kernels_in(fn, *args):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall("custom_call @mosaic_gpu", text)), text.count('"stablehlo.scatter"')


@pytest.mark.usefixtures("hopper")
def test_by_default_hopper_attends_and_writes_with_kernels_alone():
    def default(*args):
        return attend_and_write(None, *args)

    kernels, scatters = kernels_in(default, *operands())
    assert kernels >= 2  # the write, the attention, and its merge where keys are split
    assert scatters == 0
    # Where there is no kernel for it, everything is XLA's.
    assert kernels_in(default, *operands("bfloat16")) == (0, 1)
    *_, q, cache, indices = operands()
    attend = jax.jit(lambda q: mla_sparse_attention(q, cache, indices, sm_scale=0.07))
    assert kernels_in(attend, q.astype(jnp.float32))[0] == 0
    table, lens = jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32)
    decode = jax.jit(lambda q, cache: mla_decode(q[:, None], cache, table, lens, sm_scale=0.07))
    assert kernels_in(decode, q, cache)[0] == 2  # attention and merge
    assert kernels_in(decode, q.astype(jnp.float32), cache)[0] == 0
    assert kernels_in(decode, q, operands("bfloat16")[-2])[0] == 2
    assert kernels_in(decode, q.astype(jnp.float32), operands("bfloat16")[-2])[0] == 0
    assert kernels_in(decode, q, LatentCache.init(4, 64, format="float32"))[0] == 0
    # 576 values a row as well, but not the kernel's.
    other = LatentCache.init(4, 64, kv_lora_rank=448, qk_rope_head_dim=128, format="bfloat16")
    assert kernels_in(decode, q, other)[0] == 0


@pytest.mark.gpu
def test_on_hopper_none_is_the_kernels_bit_for_bit():
    """Inside a donated loop, as a decode step runs; and close to what XLA computes."""

    def loop(implementation):
        def run(cache, *args):
            def body(i, carry):
                cache, _, _ = carry
                *latents, slots, q, indices = args
                out, lse, cache = attend_and_write(
                    implementation, *latents, slots + i, q, cache, indices
                )
                return cache, out, lse

            init = cache, jnp.zeros((3, 8, 512), jnp.bfloat16), jnp.zeros((3, 8))
            return jax.lax.fori_loop(0, 3, body, init)

        kv_c, k_pe, slots, q, cache, indices = operands()
        compiled = jax.jit(run, donate_argnums=0).lower(cache, kv_c, k_pe, slots, q, indices)
        compiled = compiled.compile()
        assert not re.search(r"= u8\[4,64,656\]\S* copy\(", compiled.as_text())
        assert compiled.memory_analysis().alias_size_in_bytes >= cache.data.nbytes
        cache, out, lse = compiled(cache, kv_c, k_pe, slots, q, indices)
        return [np.asarray(x).astype(np.float32) for x in (cache.data, out, lse)]

    default, kernels, xla = loop(None), loop("mosaic_gpu"), loop("xla")
    for a, b in zip(default, kernels, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(default[0], xla[0])
    assert_attention_close(*default[1:], *xla[1:])
