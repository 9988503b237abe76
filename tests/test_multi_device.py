"""Tensor parallelism equals one device: on simulated devices, and on real GPUs (`multigpu`).

`pytest -m multigpu` on a machine with 2, 4 or 8 Hopper GPUs; what needs more of them is skipped.

What can hold exactly. Attention knows no other head, so a device's heads are bit for bit what the
same kernel gives for them alone, and all copies of the cache stay equal. Against all heads in one
call, kernels of other tiles and splits round differently. A sum over devices is rounded once more
than a sum on one. With float32 weights and activations and "xla", tokens are the same, in a free
run over an FP8 cache. The kernels take and give bfloat16, which turns a difference in the 24th bit
into one in the 8th now and then, an e4m3 value of the cache or an expert flips, and free runs drift
apart, as those of two XLA programs in bfloat16 do. So the kernels are compared step by step, each
from the state of one device.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mla_jax import LatentCache, MultiHeadLatentAttention, tensor_parallel
from mla_jax.checkpoint import load_model
from mla_jax.generate import Generator
from mla_jax.heads import with_padded_heads
from mla_jax.sharding import Parallelism
from tests.helpers import assert_attention_close, random_latents
from tests.huggingface import checkpoint_dir, expected, make_mesh, prompts, step_by_step
from tests.test_examples import load_example
from tests.test_sharding import AXIS_TYPES, cases

CHECKPOINTS = ["deepseek_v3", "deepseek_v32_dsa", "glm_moe_dsa"]
NEW = 24
CASES = functools.cache(functools.partial(cases, topk=512))


@pytest.fixture
def implementation(devices):
    """Of sparse attention and the cache write."""
    return "mosaic_gpu" if devices[0].platform == "gpu" else "xla"


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), tree)


def assert_all_copies_equal(tree):
    for leaf in jax.tree.leaves(tree):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert first.shape == leaf.shape  # replicated
        for other in others:
            np.testing.assert_array_equal(other.view(np.uint8), first.view(np.uint8))


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["sparse", "decode", "prefill"])
def test_ops_equal_one_device(devices, name, heads):
    """Auto and Explicit axes, padded and native."""
    op, (q, *others), kwargs = CASES(heads)[name]
    sink, rest = kwargs["attn_sink"], {k: v for k, v in kwargs.items() if k != "attn_sink"}
    one_device = jax.jit(functools.partial(op, sm_scale=0.07, return_lse=True))
    whole = float32(one_device(q, *others, **kwargs))
    parts = [
        (jnp.asarray(part), jnp.asarray(sink_part))
        for part, sink_part in zip(
            np.split(np.asarray(q), len(devices), axis=-2),
            np.split(np.asarray(sink), len(devices)),
            strict=True,
        )
    ]
    for pad_heads in (False, True):
        alone_op = with_padded_heads(op) if pad_heads else op
        alone = jax.jit(functools.partial(alone_op, sm_scale=0.07, return_lse=True))
        alone_results = [alone(part, *others, attn_sink=s, **rest) for part, s in parts]
        outs, lses = zip(*map(float32, alone_results), strict=True)
        part_by_part = np.concatenate(outs, axis=-2), np.concatenate(lses, axis=-1)
        for axis_type in AXIS_TYPES:
            mesh = make_mesh(len(devices), axis_type)
            sharded = tensor_parallel(op, mesh=mesh, pad_heads=pad_heads)
            step = jax.jit(functools.partial(sharded, sm_scale=0.07, return_lse=True))
            result = step(q, *others, **kwargs)
            assert len(result[0].addressable_shards) == len(devices)
            assert result[0].addressable_shards[0].data.shape[-2] == heads // len(devices)
            out, lse = float32(result)
            assert_attention_close(out, lse, *whole)
            np.testing.assert_array_equal(out, part_by_part[0])
            np.testing.assert_array_equal(lse, part_by_part[1])


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=lambda t: t.name)
def test_every_device_writes_the_same_cache(devices, axis_type, implementation):
    rng = np.random.default_rng(3)
    parallelism = Parallelism(make_mesh(len(devices), axis_type))
    kv_c, k_pe = random_latents(rng, 100)
    slots = jnp.asarray(rng.permutation(256)[:100], jnp.int32).at[7].set(-1)

    def write(cache, kv_c, k_pe, slots):
        return cache.write(kv_c, k_pe, slots, implementation=implementation)

    one_device = write(LatentCache.init(4, 64), kv_c, k_pe, slots)
    cache = LatentCache.init(4, 64, sharding=parallelism.replicated_sharding())
    arrays = jax.device_put((kv_c, k_pe, slots), parallelism.replicated_sharding())
    cache = jax.jit(parallelism.on_each_device(write), donate_argnums=0)(cache, *arrays)
    assert_all_copies_equal(cache)
    np.testing.assert_array_equal(cache.data, one_device.data)


@pytest.fixture
def bfloat16_attention(monkeypatch):
    """Layers of any dtype hand bfloat16 to attention and get it back, as the kernels have it."""
    attend = MultiHeadLatentAttention._op

    def rounded(self, op):
        op = attend(self, op)
        return lambda q, *args: op(q.astype(jnp.bfloat16), *args).astype(q.dtype)

    monkeypatch.setattr(MultiHeadLatentAttention, "_op", rounded)


@pytest.fixture
def example(tmp_path, capsys):
    """`example(case, size, ...)`: the tokens that examples/decode.py gives, with an FP8 cache."""
    decode = load_example("decode")

    def run(case, size, dtype, implementation):
        prompt_file, output = tmp_path / "prompts.json", tmp_path / "output.json"
        prompt_file.write_text(json.dumps(expected(case)["input_ids"].tolist()))
        code = decode.main(
            [f"--checkpoint={checkpoint_dir(case)}", f"--prompt-ids={prompt_file}",
             f"--max-new-tokens={NEW}", f"--dtype={dtype}", "--kv-cache-format=fp8_ds_mla",
             f"--tensor-parallel={size}", f"--implementation={implementation}",
             f"--output={output}"]
        )  # fmt: skip
        printed = capsys.readouterr()
        assert code == 0, printed.err
        assert f"devices         {size} of" in printed.out
        tokens = json.loads(output.read_text())["generated"]
        assert [len(sequence) for sequence in tokens] == [NEW, NEW]
        return tokens

    return run


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_example_decodes_the_tokens_of_one_device(devices, case, example):
    with jax.default_matmul_precision("highest"):  # on GPUs, the default is less than float32
        tokens = [example(case, size, "float32", "xla") for size in (1, len(devices))]
    assert tokens[0] == tokens[1]


def test_the_example_runs_with_the_kernels(devices, implementation, example):
    example("deepseek_v32_dsa", len(devices), "bfloat16", implementation)


@pytest.mark.parametrize(
    ("dtype", "max_error", "min_same"),
    [("float32", 0.01, 0.95), ("bfloat16", 0.06, 0.8)],  # bfloat16 as one GPU's kernels and XLA
)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_step_by_step_with_the_kernels(
    devices, case, dtype, max_error, min_same, bfloat16_attention
):
    """With the default implementation. The caches' copies are still equal after a free run."""

    def load(mesh):
        return load_model(checkpoint_dir(case), dtype=jnp.dtype(dtype), mesh=mesh)

    one_device, many = load(None), load(make_mesh(len(devices), AxisType.Auto))
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        run = Generator(many).generate(prompts(case), NEW)
        assert [len(tokens) for tokens in run.run()] == [NEW, NEW]
        assert_all_copies_equal(run.state)
        state = Generator(one_device).generate(prompts(case), NEW).state
        same, error = step_by_step(one_device, many, state, NEW - 1)
    print(f"{case}, {dtype}: {same:.0%} of the tokens, median error {error:.4f}")
    assert error < max_error
    assert same > min_same
