"""The golden Hugging Face checkpoints: tiny models and what transformers computes for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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


def prompts(case, lens=(40, 40)):
    ids = expected(case)["input_ids"]
    return [row[:n].tolist() for row, n in zip(ids, lens, strict=True)]


def make_mesh(size, axis_type=AxisType.Auto):
    return jax.make_mesh((size,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:size])


@functools.cache
def load(case, tensor_parallel=1, axis_type=AxisType.Auto):
    mesh = make_mesh(tensor_parallel, axis_type) if tensor_parallel > 1 else None
    return load_model(checkpoint_dir(case), dtype=jnp.float32, mesh=mesh)


def _compiled_step(model):
    """`state -> (logits, state)`, one greedy token for all sequences; on the model's devices."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params, state):
        kv_lens = state.kv_lens + 1
        logits, caches = nnx.merge(graphdef, params)(
            state.last_tokens[:, None],
            state.caches,
            page_indices=state.page_indices,
            kv_lens=kv_lens,
            last_token_only=True,
        )
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        state = dataclasses.replace(state, caches=caches, kv_lens=kv_lens, last_tokens=tokens)
        return logits, state

    sharding = model.parallelism.replicated_sharding()
    return lambda state: step(params, jax.device_put(state, sharding))


def step_by_step(model, other, state, num_steps):
    """How well `other` decodes each next token from the state that `model` has come to.

    Returns the share of equal tokens, and the median over the steps of the logits' error in units
    of their standard deviation.
    """
    step, other_step = _compiled_step(model), _compiled_step(other)
    same, errors = [], []
    for _ in range(num_steps):
        other_logits, other_state = jax.device_get(other_step(state))
        logits, state = step(state)
        logits, tokens = jax.device_get((logits, state.last_tokens))
        same += (other_state.last_tokens == tokens).tolist()
        errors.append(np.std(other_logits - logits) / np.std(logits))
    return np.mean(same), np.median(errors)
