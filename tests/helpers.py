"""Tolerances of the project, test data, and small conveniences shared by the test modules."""

import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

DATA = pathlib.Path(__file__).parent / "data"


def assert_attention_close(out, lse, expected_out, expected_lse):
    """The numbers that must hold against FlashMLA and the float64 oracle.

    out: |error| <= max(8e-3 x rms of the expected (token, head) row, 2.01/128 x |expected|) and
    cosine distance < 5e-6 over the array; lse: |error| <= max(1e-5, 8.01/65536 x |expected|); the
    masks of infinities and NaN are equal.
    """
    out, expected_out = np.asarray(out, np.float64), np.asarray(expected_out, np.float64)
    assert out.shape == expected_out.shape
    _assert_same_nonfinite("out", out, expected_out)
    rms = np.sqrt(np.mean(expected_out**2, axis=-1, keepdims=True))
    tolerance = np.maximum(8e-3 * rms, 2.01 / 128 * np.abs(expected_out))
    _assert_within("out", out, expected_out, tolerance)
    energy = np.sum(out**2 + expected_out**2)
    if energy > 0:
        distance = 1 - 2 * np.sum(out * expected_out) / energy
        assert distance < 5e-6, f"cosine distance {distance:.2e}"

    lse, expected_lse = np.asarray(lse, np.float64), np.asarray(expected_lse, np.float64)
    assert lse.shape == expected_lse.shape
    _assert_same_nonfinite("lse", lse, expected_lse)
    finite = np.isfinite(expected_lse)
    tolerance = np.maximum(1e-5, 8.01 / 65536 * np.abs(expected_lse[finite]))
    _assert_within("lse", lse[finite], expected_lse[finite], tolerance)


def _assert_same_nonfinite(name, actual, expected):
    for mask in (np.isnan, np.isposinf, np.isneginf):
        wrong = mask(actual) != mask(expected)
        assert not wrong.any(), f"{name}: {wrong.sum()} entries differ in {mask.__name__}"


def _assert_within(name, actual, expected, tolerance):
    error = np.abs(actual - expected)
    wrong = error > tolerance
    worst = np.max(error / np.maximum(tolerance, 1e-300), initial=0)
    assert not wrong.any(), (
        f"{name}: {wrong.sum()} of {wrong.size} off, worst {worst:.2f} x allowed"
    )


def load_flashmla(name):
    """A golden file of FlashMLA's sm_90a kernels: bfloat16 decoded, lse +inf as our -inf."""
    with np.load(DATA / "flashmla" / f"{name}.npz") as file:
        data = dict(file)
    for key, value in data.items():
        if value.dtype == np.uint16:
            data[key] = value.view(ml_dtypes.bfloat16)
    data["lse"] = np.where(np.isposinf(data["lse"]), -np.inf, data["lse"])
    data["sm_scale"] = float(data.pop("softmax_scale"))
    return data


def random_latents(rng, tokens, kv_lora_rank=512, qk_rope_head_dim=64):
    """Latents whose 128-dim tiles differ in size, as real ones do; bfloat16."""
    tiles = np.exp2(rng.uniform(-3, 2, (tokens, -(-kv_lora_rank // 128))))
    tiles = np.repeat(tiles, 128, axis=1)[:, :kv_lora_rank]
    kv_c = (rng.normal(size=(tokens, kv_lora_rank)) * tiles).astype(ml_dtypes.bfloat16)
    k_pe = rng.normal(size=(tokens, qk_rope_head_dim)).astype(ml_dtypes.bfloat16)
    return jnp.asarray(kv_c), jnp.asarray(k_pe)


def random_q(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
