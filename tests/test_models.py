import dataclasses
import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import mla_jax.models.causal_lm
from mla_jax import LatentCache, allocate_pages
from mla_jax.cache import dequantize, quantize
from mla_jax.models import MODEL_TYPES, CausalLM, ModelConfig, MoEConfig, presets
from mla_jax.models.moe import Router, apply_experts
from mla_jax.sharding import Parallelism
from tests.huggingface import CASES, checkpoint_dir, expected, load, make_mesh


@nnx.jit
def call(model, input_ids, caches, **tokens):
    return model(input_ids, caches, **tokens)


def prefill(model, input_ids, chunk, format="float32", page_size=16):
    """Logits of all tokens, the prompts fed in equal chunks; a first, short one is padded."""
    batch, length = input_ids.shape
    page_indices, num_pages = allocate_pages([length] * batch, page_size)
    caches = model.init_caches(num_pages, page_size, format=format)
    padding = -length % chunk
    padded = jnp.pad(jnp.asarray(input_ids, jnp.int32), ((0, 0), (padding, 0)))
    logits = []
    for start in range(0, length + padding, chunk):
        new, caches = call(
            model,
            padded[:, start : start + chunk],
            caches,
            page_indices=jnp.asarray(page_indices),
            kv_lens=jnp.full(batch, start + chunk - padding, jnp.int32),
        )
        logits.append(np.asarray(new))
    return np.concatenate(logits, axis=1)[:, padding:]


# (Chunks of 7 under tensor parallelism, and the tokens that follow: tests/test_generate.py.)
@pytest.mark.parametrize(
    ("tensor_parallel", "chunk"),
    [(1, 40), (1, 7), (8, 40)],
    ids=["TP1-one-chunk", "TP1-chunks-of-7", "TP8-one-chunk"],
)
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case, tensor_parallel, chunk):
    data = expected(case)
    logits = prefill(load(case, tensor_parallel), data["input_ids"], chunk)
    np.testing.assert_allclose(logits, data["logits"], atol=1e-3, rtol=0)


def test_logits_agree_with_transformers_on_an_explicit_mesh():
    data = expected("glm_moe_dsa")
    logits = prefill(load("glm_moe_dsa", 8, AxisType.Explicit), data["input_ids"], 40)
    np.testing.assert_allclose(logits, data["logits"], atol=1e-3, rtol=0)


# Bounds on the error of the logits relative to their standard deviation, (median, rms): 1.3 times
# what was measured. These tiny random models are the worst case: e4m3's 3 bits reach the logits
# after one or two layers, and near ties between experts, or between the indexer's keys, change
# single tokens by 2 to 3 (hence rms far above the median). `test_the_error_is_that_of_the_format`
# shows that nothing is added.
CACHE_ERROR = {
    ("deepseek_v3", "fp8_ds_mla"): (0.055, 0.161),
    ("deepseek_v3_yarn", "fp8_ds_mla"): (0.064, 0.161),
    ("deepseek_v2_style_no_q_lora", "fp8_ds_mla"): (0.056, 0.089),
    ("deepseek_v32_dsa", "fp8_ds_mla"): (0.076, 0.315),
    ("glm_moe_dsa", "fp8_ds_mla"): (0.100, 0.255),
    ("deepseek_v3_yarn_fp8_weights", "fp8_ds_mla"): (0.062, 0.103),
    ("deepseek_v3", "bfloat16"): (0.0043, 0.0069),
    ("deepseek_v32_dsa", "bfloat16"): (0.0052, 0.169),
}


def test_every_case_has_a_bound():
    assert {case for case, format in CACHE_ERROR if format == "fp8_ds_mla"} == set(CASES)


@pytest.mark.parametrize(("case", "format"), CACHE_ERROR)
def test_logit_error_of_quantized_caches(case, format, record_property):
    data, model = expected(case), load(case)
    error = prefill(model, data["input_ids"], 40, format=format) - data["logits"]
    error = np.abs(error) / data["logits"].std()
    median, rms = np.median(error), np.sqrt(np.mean(error**2))
    record_property(f"{format} logit error / logit std, median", float(median))
    record_property(f"{format} logit error / logit std, rms", float(rms))
    print(
        f"{case}, {format}: logit error / logit std: median {median:.4f}, rms {rms:.4f},"
        f" largest {error.max():.4f}"
    )
    max_median, max_rms = CACHE_ERROR[case, format]
    assert median < max_median
    assert rms < max_rms


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v32_dsa"])
def test_the_error_is_that_of_the_format(case, monkeypatch):
    """The FP8 cache gives the bits of a float32 cache of latents that went through its rows."""
    data, model = expected(case), load(case)
    want = prefill(model, data["input_ids"], 40, format="fp8_ds_mla", page_size=8)
    write = LatentCache.write

    def write_rounded(self, kv_c, k_pe, slots, **kwargs):
        if self.qk_rope_head_dim == 0:  # The indexer's keys, bfloat16 beside fp8_ds_mla.
            return write(self, kv_c.astype(jnp.bfloat16).astype(jnp.float32), k_pe, slots)
        kv_c, k_pe = jnp.split(dequantize(quantize(kv_c, k_pe)), [self.kv_lora_rank], axis=-1)
        return write(self, kv_c, k_pe, slots)

    monkeypatch.setattr(LatentCache, "write", write_rounded)
    # Page size 8 keeps this trace apart from those of other tests.
    logits = prefill(model, data["input_ids"], 40, format="float32", page_size=8)
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_last_token_only_gives_the_last_row_of_the_logits():
    model, data = load("deepseek_v3"), expected("deepseek_v3")
    ids = jnp.asarray(data["input_ids"], jnp.int32)
    page_indices, num_pages = allocate_pages([40, 40], 16)
    tokens = {
        "page_indices": jnp.asarray(page_indices),
        "kv_lens": jnp.array([40, 23], jnp.int32),
    }

    @nnx.jit
    def last(model, ids, caches, **tokens):
        return model(ids, caches, last_token_only=True, **tokens)

    caches = model.init_caches(num_pages, 16, format="float32")
    ragged = jnp.concatenate([ids[0], ids[1, :23], jnp.zeros(2, jnp.int32)])
    logits, _ = last(model, ragged, caches, cu_q_lens=jnp.array([0, 40, 63], jnp.int32), **tokens)
    want = np.stack([data["logits"][0, -1], data["logits"][1, 22]])
    np.testing.assert_allclose(logits, want, atol=1e-3, rtol=0)


def test_calls_that_do_not_fit_are_refused():
    model = load("deepseek_v3")
    caches = model.init_caches(2)
    tokens = {"page_indices": jnp.zeros((1, 1), jnp.int32), "kv_lens": jnp.ones(1, jnp.int32)}
    with pytest.raises(ValueError, match="must be one per layer, 2"):
        model(jnp.zeros((1, 1), jnp.int32), caches[:1], **tokens)
    with pytest.raises(ValueError, match="caches is a LatentCache; make them with init_caches"):
        model(jnp.zeros((1, 1), jnp.int32), caches[0], **tokens)
    with pytest.raises(ValueError, match=r"input_ids=\[\[1\]\] must be an array"):
        model([[1]], caches, **tokens)
    with pytest.raises(ValueError, match=r"input_ids\.shape=\(1,\) must be \[batch, q_len\]"):
        model(jnp.zeros(1, jnp.int32), caches, **tokens)


def test_last_tokens_of_nothing():
    model = load("deepseek_v3")
    tokens = {"page_indices": jnp.zeros((2, 1), jnp.int32), "kv_lens": jnp.zeros(2, jnp.int32)}
    for ids, more in (
        (jnp.zeros((2, 0), jnp.int32), {}),
        (jnp.zeros(0, jnp.int32), {"cu_q_lens": jnp.zeros(3, jnp.int32)}),
    ):
        logits, _ = model(ids, model.init_caches(2), last_token_only=True, **tokens, **more)
        assert logits.shape == (2, 320)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v32_dsa"])
def test_every_parameter_lies_on_all_devices(case, axis_type):
    """One that did not would be copied to the others in every step."""
    config, mesh = load(case).config, make_mesh(2, axis_type)

    def build():
        return CausalLM(config, mesh=mesh, rngs=nnx.Rngs(0))

    for path, variable in nnx.to_flat_state(nnx.state(build())):
        assert variable[...].sharding.device_set == set(mesh.devices.flat), path
    # So that a checkpoint can be restored to where the parameters belong.
    for path, variable in nnx.to_flat_state(nnx.state(nnx.eval_shape(build))):
        assert dict(variable.get_value().sharding.mesh.shape) == {"model": 2}, path


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("case", ["deepseek_v3_yarn", "glm_moe_dsa"])
def test_nothing_relies_on_promotion(case, tensor_parallel):
    model = CausalLM(load(case).config, mesh=make_mesh(tensor_parallel), rngs=nnx.Rngs(0))
    tokens = {"page_indices": jnp.arange(4).reshape(2, 2), "kv_lens": jnp.array([5, 2])}
    model(jnp.ones((2, 5), jnp.int32), model.init_caches(4, 16), **tokens)
    ragged = {"cu_q_lens": jnp.array([0, 5, 7]), "last_token_only": True}
    model(jnp.ones(8, jnp.int32), model.init_caches(4, 16), **tokens, **ragged)


def test_docstring_examples():
    assert doctest.testmod(mla_jax.models.causal_lm).failed == 0


# Mixture of experts


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"), [(1, 4, 2), (5, 64, 3), (37, 4, 2), (300, 16, 3)]
)
def test_experts_agree_with_a_loop(tokens, num_experts, k):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, 16))
    gate, up = rng.normal(size=(2, num_experts, 16, 24)) / 4
    down = rng.normal(size=(num_experts, 24, 16)) / 5
    # Uneven on purpose: some experts get most of the tokens, some none.
    experts = np.argsort(rng.random((tokens, num_experts)) * np.arange(num_experts), axis=1)[:, :k]
    weights = rng.random((tokens, k))
    floats = [jnp.asarray(a, jnp.float32) for a in (x, weights, gate, up, down)]
    out = jax.jit(apply_experts)(floats[0], jnp.asarray(experts, jnp.int32), *floats[1:])
    want = np.zeros_like(x)
    for t in range(tokens):
        for e, w in zip(experts[t], weights[t], strict=True):
            a = x[t] @ gate[e]
            want[t] += w * ((a / (1 + np.exp(-a)) * (x[t] @ up[e])) @ down[e])
    np.testing.assert_allclose(out, want, atol=1e-4)


def test_expert_work_grows_with_the_tokens_not_with_the_experts():
    """8 experts per token of 256: about 8 products per token, not 256."""
    tokens, k, num_experts = 2048, 8, 256
    x = jax.ShapeDtypeStruct((tokens, 8), jnp.float32)
    experts = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, k), jnp.float32)
    kernel = jax.ShapeDtypeStruct((num_experts, 8, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(apply_experts)(x, experts, weights, kernel, kernel, kernel)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    dots = [e for e in scan.params["jaxpr"].eqns if e.primitive.name == "dot_general"]
    rows = scan.params["length"] * dots[0].outvars[0].aval.shape[0]
    assert rows < 2 * tokens * k


def route(scores, bias, **config):
    """The router on given sigmoid scores."""
    scores = np.asarray(scores, np.float32)
    config = MoEConfig(intermediate_size=1, num_experts=scores.shape[-1], **config)
    router = Router(scores.shape[-1], config, parallelism=Parallelism(), rngs=nnx.Rngs(0))
    router.kernel[...] = jnp.eye(scores.shape[-1])
    router.e_score_correction_bias[...] = jnp.asarray(bias, jnp.float32)
    experts, weights = router(jnp.log(scores / (1 - scores)))
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(*map(np.asarray, (experts, order)), -1), np.take_along_axis(
        *map(np.asarray, (weights, order)), -1
    )


def test_the_correction_bias_only_affects_the_choice():
    scores = [[0.9, 0.8, 0.2, 0.1]]
    experts, weights = route(scores, [0, 0, 5, 0], num_experts_per_token=2)
    np.testing.assert_array_equal(experts, [[0, 2]])
    np.testing.assert_allclose(weights, [[0.9 / 1.1, 0.2 / 1.1]], rtol=1e-5)


def test_routing_is_limited_to_the_best_groups():
    # Group 1 has the best expert, but groups 0 and 2 have the better pairs.
    scores = [[0.6, 0.6, 0.95, 0.1, 0.7, 0.5]]
    config = {"num_experts_per_token": 3, "num_groups": 3, "num_groups_per_token": 2}
    experts, weights = route(scores, np.zeros(6), routed_scaling_factor=2.5, **config)
    np.testing.assert_array_equal(experts, [[0, 1, 4]])
    np.testing.assert_allclose(weights, 2.5 * np.array([[0.6, 0.6, 0.7]]) / 1.9, rtol=1e-5)
    # A negative bias must not make an expert outside of the groups look better.
    experts, _ = route(scores, np.full(6, -2.0), **config)
    np.testing.assert_array_equal(experts, [[0, 1, 4]])


def test_weights_are_left_alone_unless_asked():
    _, weights = route([[0.9, 0.8, 0.2]], np.zeros(3), num_experts_per_token=2,
                       normalize_weights=False)  # fmt: skip
    np.testing.assert_allclose(weights, [[0.9, 0.8]], rtol=1e-5)


def test_impossible_routing_is_refused():
    with pytest.raises(ValueError, match=r"self\.num_experts=6 must be divisible"):
        MoEConfig(1, num_experts=6, num_experts_per_token=1, num_groups=4)
    with pytest.raises(ValueError, match=r"self\.num_groups=0"):
        MoEConfig(1, num_experts=6, num_experts_per_token=1, num_groups=0)
    with pytest.raises(ValueError, match=r"num_experts_per_token=3 must be within 1\.\.2"):
        MoEConfig(1, num_experts=6, num_experts_per_token=3, num_groups=3)


# Configurations


def hf_config(case="deepseek_v3", **changes):
    return json.loads((checkpoint_dir(case) / "config.json").read_text()) | changes


@pytest.mark.parametrize("case", CASES)
def test_golden_configs_parse(case):
    config = ModelConfig.from_file(checkpoint_dir(case) / "config.json")
    assert config.attention.num_heads == 16
    assert config.is_sparse == (case in ("deepseek_v32_dsa", "glm_moe_dsa"))
    assert config.dense_layers[0]
    assert not any(config.dense_layers[1:])


def test_indexer_styles_follow_the_family():
    deepseek = ModelConfig.from_hf(hf_config("deepseek_v32_dsa"))
    assert not deepseek.attention.indexer.rope_interleaved
    assert deepseek.indexed_layers == (True, True)
    glm = ModelConfig.from_hf(hf_config("glm_moe_dsa"))
    assert glm.attention.indexer.rope_interleaved
    assert glm.indexed_layers == (True, False, True)
    said = ModelConfig.from_hf(hf_config("glm_moe_dsa", indexer_rope_interleave=False))
    assert not said.attention.indexer.rope_interleaved


def test_kimi_k2_is_deepseek_v3():
    kimi = ModelConfig.from_hf(hf_config(model_type="kimi_k2"))
    assert kimi == dataclasses.replace(ModelConfig.from_hf(hf_config()), model_type="kimi_k2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers=2\.0 must be a positive integer"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None must be a positive"),
        ({"vocab_size": "320"}, "vocab_size='320' must be a positive integer"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types="),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_config(**changes))


@pytest.mark.parametrize(
    "key", ["routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace"]
)
def test_routing_has_no_silent_defaults(key):
    config = hf_config()
    with pytest.raises(ValueError, match=f"{key} is missing"):
        ModelConfig.from_hf(config | {key: None})
    del config[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        ModelConfig.from_hf(config)


def test_layer_types_replace_first_k_dense_replace():
    config = hf_config(mlp_layer_types=["dense", "sparse"])
    want = ModelConfig.from_hf(config)
    del config["first_k_dense_replace"]
    assert ModelConfig.from_hf(config) == want == ModelConfig.from_hf(hf_config())


def test_dense_models_need_no_routing():
    config = hf_config(first_k_dense_replace=2)
    for key in ("n_routed_experts", "routed_scaling_factor", "n_group", "topk_group"):
        del config[key]
    assert ModelConfig.from_hf(config).moe is None


def test_config_files_are_named_in_errors(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=str(file)):
        ModelConfig.from_file(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=str(file)):
        ModelConfig.from_file(file)
    file.write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=rf"{file}: model_type='bert'.*{MODEL_TYPES[0]}"):
        ModelConfig.from_file(file)


def test_the_first_layer_cannot_share():
    with pytest.raises(ValueError, match=r"indexed_layers\[0\]=False"):
        ModelConfig.from_hf(hf_config("glm_moe_dsa", indexer_types=["shared", "full", "full"]))


def test_eos_token_ids():
    assert ModelConfig.from_hf(hf_config()).eos_token_ids == ()
    assert ModelConfig.from_hf(hf_config(eos_token_id=7)).eos_token_ids == (7,)
    assert ModelConfig.from_hf(hf_config(eos_token_id=[7, 8])).eos_token_ids == (7, 8)


def test_generation_config_says_what_ends_a_sequence(tmp_path):
    file, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    file.write_text(json.dumps(hf_config(eos_token_id=7)))
    for text, ids in (("{}", (7,)), ('{"eos_token_id": [7, 8]}', (7, 8))):
        generation.write_text(text)
        assert ModelConfig.from_file(file).eos_token_ids == ids
    for text in ("[", '{"eos_token_id": "7"}', '{"eos_token_id": [[7]]}'):
        generation.write_text(text)
        with pytest.raises(ValueError, match=str(generation)):
            ModelConfig.from_file(file)


def test_max_tensor_parallel_divides_everything():
    config = ModelConfig.from_hf(hf_config())
    assert [config.max_tensor_parallel(n) for n in (1, 3, 7, 8, 15)] == [1, 2, 4, 8, 8]
    assert presets.DEEPSEEK_V32.max_tensor_parallel(8) == 8


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        (presets.DEEPSEEK_V3, 671),
        (presets.DEEPSEEK_V32, 672),
        (presets.GLM_5, 744),
        (presets.KIMI_K2, 1026),
    ],
    ids=["V3", "V3.2", "GLM-5", "K2"],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    # Two layers of each kind stand for all of them.
    layers = [preset.dense_layers.index(dense) for dense in (True, False)]
    small = dataclasses.replace(
        preset,
        num_layers=2,
        dense_layers=(True, False),
        indexed_layers=(True, True) if preset.is_sparse else (),
    )
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: CausalLM(small, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def count(module):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))

    dense, moe = (count(layer) for layer in model.layers)
    num_dense = sum(preset.dense_layers)
    assert layers[0] == 0
    total = count(model) + (num_dense - 1) * dense + (preset.num_layers - num_dense - 1) * moe
    assert total / 1e9 == pytest.approx(billions, rel=0.005)
