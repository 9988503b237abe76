import math

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.models.presets import DEEPSEEK_V3, DEEPSEEK_V32, GLM_5, KIMI_K2
from mla_jax.rope import RopeConfig, YarnConfig, apply_rope

YARN = YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=1, mscale_all_dim=1)


def rotate_by_complex_numbers(x, positions, theta, interleaved):
    """Float64 oracle: pair i is a complex number, multiplied by exp(i p f_i)."""
    half = x.shape[-1] // 2
    x = np.asarray(x, np.float64)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turn = np.exp(1j * np.asarray(positions)[:, None, None] * theta ** (-np.arange(half) / half))
    rotated = (a + 1j * b) * turn
    if interleaved:
        return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)
    return np.concatenate([rotated.real, rotated.imag], axis=-1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half_split"])
def test_rotation_is_complex_multiplication(interleaved):
    x = np.random.default_rng(0).normal(size=(5, 3, 64)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 5000])
    out = apply_rope(
        jnp.asarray(x), jnp.asarray(positions), RopeConfig(1e4), interleaved=interleaved
    )
    want = rotate_by_complex_numbers(x, positions, 1e4, interleaved)
    # An angle of 5,000 radians has an ulp of 5e-4 in float32, as in the reference implementations.
    np.testing.assert_allclose(out, want, atol=2e-3)
    np.testing.assert_allclose(out[:3], want[:3], atol=1e-5)


def test_heads_share_positions_and_dtype_is_kept():
    x = jnp.ones((4, 2, 3, 8), jnp.bfloat16)
    positions = jnp.arange(8).reshape(4, 2)
    out = apply_rope(x, positions, RopeConfig())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[:, :, 0], out[:, :, 2])
    np.testing.assert_array_equal(out[:, :, 0], apply_rope(x[:, :, 0], positions, RopeConfig()))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"x\.shape=\(4, 8\) must start with positions\.shape"):
        apply_rope(jnp.ones((4, 8)), jnp.arange(3), RopeConfig())
    with pytest.raises(ValueError, match="dim=7 must be even"):
        apply_rope(jnp.ones((4, 7)), jnp.arange(4), RopeConfig())


def test_yarn_keeps_fast_dims_and_slows_slow_dims():
    plain = RopeConfig(1e4).inverse_frequencies(64)
    yarn = RopeConfig(1e4, YARN).inverse_frequencies(64)
    turns = plain * 4096 / (2 * math.pi)
    np.testing.assert_array_equal(yarn[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(yarn[turns < 0.8], plain[turns < 0.8] / 40, rtol=1e-6)
    between = (turns < 20) & (turns > 1.5)
    assert between.any()
    assert ((yarn < plain) & (yarn > plain / 40))[between].all()
    assert (np.diff(yarn) < 0).all()


def test_yarn_with_equal_betas_is_a_step():
    step = YarnConfig(factor=32.0, original_max_position_embeddings=4096, beta_fast=1, beta_slow=1)
    ratio = RopeConfig(5e4, step).inverse_frequencies(64) / RopeConfig(5e4).inverse_frequencies(64)
    assert np.isfinite(ratio).all()
    assert ((ratio > 0.999) | (ratio < 1 / 31.9)).sum() >= 31


@pytest.mark.parametrize(
    ("preset", "sm_scale"),
    [(DEEPSEEK_V3, 0.135234), (DEEPSEEK_V32, 0.135234), (GLM_5, 0.0625)],
    ids=["V3", "V3.2", "GLM-5"],
)
def test_softmax_scale_of_real_models(preset, sm_scale):
    assert preset.attention.sm_scale == pytest.approx(sm_scale, abs=1e-6)
    assert preset.attention.rope.cos_sin_factor == 1.0


def test_kimi_k2_scale_has_its_own_factor():
    m = 0.1 * math.log(32) + 1
    assert KIMI_K2.attention.sm_scale == pytest.approx(192**-0.5 * m**2)


def test_cos_sin_factor():
    def factor(**kwargs):
        yarn = YarnConfig(factor=4.0, original_max_position_embeddings=1024, **kwargs)
        return RopeConfig(1e4, yarn).cos_sin_factor

    def m(s):
        return 0.1 * s * math.log(4) + 1

    assert factor() == pytest.approx(m(1))
    assert factor(mscale=0.7, mscale_all_dim=0.3) == pytest.approx(m(0.7) / m(0.3))
    assert factor(attention_factor=1.5) == 1.5


def test_old_and_new_config_keys_say_the_same():
    scaling = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
               "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
    old = RopeConfig.from_hf({"rope_theta": 10000, "rope_scaling": {"type": "yarn", **scaling}})
    new = RopeConfig.from_hf(
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **scaling}}
    )
    assert old == new == RopeConfig(1e4, YARN)
    assert RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": None}) == RopeConfig(1e6)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
    ],
)
def test_parameters_that_would_be_dropped_are_refused(config):
    with pytest.raises(ValueError, match="rope_parameters"):
        RopeConfig.from_hf(config)


def test_unknown_rope_types_are_refused():
    with pytest.raises(ValueError, match="rope_type='llama3'"):
        RopeConfig.from_hf({"rope_scaling": {"rope_type": "llama3", "factor": 8}})
    with pytest.raises(ValueError, match="needs factor"):
        RopeConfig.from_hf({"rope_scaling": {"type": "yarn"}})
    with pytest.raises(ValueError, match=r"self\.factor=0\.5"):
        YarnConfig(factor=0.5, original_max_position_embeddings=4096)
