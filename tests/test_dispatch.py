"""Who runs when: on a CPU machine that pretends to sit beside a Hopper GPU."""

import jax
import jax.numpy as jnp
import pytest

from mla_jax import dispatch


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
