"""The golden Hugging Face checkpoints: tiny models and what transformers computes for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from mla_jax.checkpoint import load_model
from tests.helpers import DATA

CASES = (
    "deepseek_v3",
    "deepseek_v3_yarn",
    "deepseek_v2_style_no_q_lora",
    "deepseek_v32_dsa",
    "glm_moe_dsa",
    "deepseek_v3_yarn_fp8_weights",
)


def checkpoint_dir(case):
    return DATA / "huggingface" / case


@functools.cache
def expected(case):
    with np.load(checkpoint_dir(case) / "expected.npz") as file:
        return dict(file)


def make_mesh(size, axis_type=AxisType.Auto):
    return jax.make_mesh((size,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:size])


@functools.cache
def load(case, tensor_parallel=1, axis_type=AxisType.Auto):
    mesh = make_mesh(tensor_parallel, axis_type) if tensor_parallel > 1 else None
    return load_model(checkpoint_dir(case), dtype=jnp.float32, mesh=mesh)
