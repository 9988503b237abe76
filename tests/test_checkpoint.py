import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from mla_jax import checkpoint
from mla_jax.checkpoint import (
    CheckpointError,
    dequantize_block,
    load_model,
    open_checkpoint,
    open_safetensors,
)
from tests.huggingface import checkpoint_dir, make_mesh


def read(directory):
    return {name: stored[...] for name, stored in open_checkpoint(directory).items()}


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a golden checkpoint, its tensors changed by a function."""

    def make(case="deepseek_v3", change=lambda tensors: None, **config_changes):
        directory = tmp_path / case
        directory.mkdir()
        config = json.loads((checkpoint_dir(case) / "config.json").read_text()) | config_changes
        (directory / "config.json").write_text(json.dumps(config))
        tensors = read(checkpoint_dir(case))
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return make


def values(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def assert_same(model, other):
    have, want = values(model), values(other)
    assert have.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(have[name], want[name], err_msg=name)


def test_values_are_those_of_the_file():
    model = load_model(checkpoint_dir("deepseek_v3"), dtype=jnp.float32)
    stored = read(checkpoint_dir("deepseek_v3"))
    layer = model.layers[1]

    def tensor(name):
        return stored[f"model.layers.1.{name}"].astype(np.float32)

    np.testing.assert_array_equal(
        layer.self_attn.q_b_proj.kernel[...], tensor("self_attn.q_b_proj.weight").T
    )
    np.testing.assert_array_equal(
        layer.input_layernorm.scale[...], tensor("input_layernorm.weight")
    )
    np.testing.assert_array_equal(
        layer.mlp.experts.down_proj[2], tensor("mlp.experts.2.down_proj.weight").T
    )
    np.testing.assert_array_equal(
        model.embed_tokens.embedding[...],
        stored["model.embed_tokens.weight"].astype(np.float32),
    )


def test_dtype_is_the_callers_except_for_the_routing_bias():
    model = load_model(checkpoint_dir("deepseek_v3"))
    for name, value in values(model).items():
        want = jnp.float32 if name.endswith("e_score_correction_bias") else jnp.bfloat16
        assert value.dtype == want, name


def test_sharded_files_with_an_index(copy):
    directory = copy()
    tensors = read(directory)
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate([names[::2], names[1::2]], start=1):
        file = directory / f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_model(directory, dtype=jnp.float32)
    assert_same(model, load_model(checkpoint_dir("deepseek_v3"), dtype=jnp.float32))

    other = sorted(set(weight_map.values()) - {weight_map["lm_head.weight"]})[0]
    weight_map["lm_head.weight"] = other
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight is missing from .*{other}"):
        load_model(directory)
    weight_map["lm_head.weight"] = "gone.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing.*lm_head\.weight"):
        load_model(directory)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: no weight_map"):
        load_model(directory)


@pytest.mark.parametrize("size", [2, 8], ids=lambda size: f"TP{size}")
def test_each_tensor_is_read_straight_into_its_shards(size, monkeypatch):
    """The host never holds more of a split parameter than one device's share of it."""
    read_sizes = {}
    read = checkpoint._Parameter.read

    def recording_read(self, index, progress):
        part = read(self, index, progress)
        read_sizes.setdefault(self.tensors[0].name, []).append(part.size)
        return part

    monkeypatch.setattr(checkpoint._Parameter, "read", recording_read)
    case = checkpoint_dir("deepseek_v3_yarn_fp8_weights")
    model = load_model(case, dtype=jnp.float32, mesh=make_mesh(size))
    monkeypatch.undo()
    assert_same(model, load_model(case, dtype=jnp.float32))

    attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
    for variable, spec in [
        (attention.q_b_proj.kernel, P(None, "model")),
        (attention.kv_b_proj.kernel, P(None, "model")),
        (attention.o_proj.kernel, P("model", None)),
        (mlp.experts.up_proj, P(None, None, "model")),
        (mlp.experts.down_proj, P(None, "model", None)),
        (model.lm_head.kernel, P(None, "model")),
    ]:
        assert variable[...].sharding.spec == spec
        assert {s.data.size for s in variable[...].addressable_shards} == {variable.size // size}
    assert attention.kv_a_layernorm.scale[...].sharding.is_fully_replicated
    sizes = read_sizes["model.layers.1.mlp.experts.0.up_proj.weight"]
    assert sizes == [mlp.experts.up_proj.size // size] * size
    assert read_sizes["model.norm.weight"] == [128]


def test_random_weights_never_exist(monkeypatch):
    """The model is built abstractly: initializers are traced, not run."""
    concrete = []
    init = nnx.Param.__init__

    def recording_init(self, value, *args, **kwargs):
        concrete.append(not isinstance(value, jax.core.Tracer))
        init(self, value, *args, **kwargs)

    monkeypatch.setattr(nnx.Param, "__init__", recording_init)
    load_model(checkpoint_dir("deepseek_v3"))
    assert concrete
    assert not any(concrete)


def test_block_scales_with_ragged_edges_and_any_slice():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(576, 200)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((5, 2)).astype(np.float32)
    full = np.repeat(np.repeat(scale, 128, axis=0)[:576], 128, axis=1)[:, :200]
    want = weight.astype(np.float32) * full
    for index in [np.s_[:, :], np.s_[100:300, 120:], np.s_[570:576, 0:1]]:
        have = dequantize_block(weight, scale, index, (128, 128))
        np.testing.assert_array_equal(have, want[index])


def test_multi_token_prediction_layers_are_skipped(copy):
    def add_mtp(tensors):
        tensors["model.layers.2.enorm.weight"] = np.ones(128, ml_dtypes.bfloat16)
        tensors["model.layers.2.self_attn.q_a_proj.weight"] = np.ones((64, 128), ml_dtypes.bfloat16)

    directory = copy(change=add_mtp, num_nextn_predict_layers=1)
    model = load_model(directory, dtype=jnp.float32)
    assert_same(model, load_model(checkpoint_dir("deepseek_v3"), dtype=jnp.float32))
    config = json.loads((directory / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2.*is unknown to a deepseek_v3"):
        load_model(directory)


NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
Q_B = "model.layers.0.self_attn.q_b_proj.weight"
FP8 = "deepseek_v3_yarn_fp8_weights"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("deepseek_v3", lambda t: t.pop(NORM), rf"{NORM} is missing from the checkpoint .*/deep"),
        ("deepseek_v3", lambda t: t.pop(EXPERT), rf"{EXPERT} is missing"),
        (
            "deepseek_v3",
            lambda t: t.update({NORM: t[NORM][:100]}),
            rf"{NORM} in .*model\.safetensors has shape \[100\]; the config asks for \[128\]",
        ),
        (
            "deepseek_v3",
            lambda t: t.update({Q_B: t[Q_B].T.copy()}),
            rf"{Q_B} in .*model\.safetensors has shape \[64, 1536\].*\[1536, 64\]",
        ),
        (
            "deepseek_v3",
            lambda t: t.update({"model.extra": t[NORM]}),
            r"model\.extra in .*model\.safetensors is unknown to a deepseek_v3 model of 2 layers",
        ),
        (
            "deepseek_v3",
            lambda t: t.update({NORM: np.ones(128, np.int32)}),
            rf"{NORM} in .*model\.safetensors: dtype I32 is not supported",
        ),
        (
            FP8,
            lambda t: t.pop(f"{Q_B}_scale_inv"),
            rf"{Q_B} in .* is float8_e4m3fn but {Q_B}_scale_inv is missing",
        ),
        (
            FP8,
            lambda t: t.update({f"{Q_B}_scale_inv": np.ones((12, 2), np.float32)}),
            rf"{Q_B}_scale_inv in .* has shape \[12, 2\].*need \[12, 1\]",
        ),
        (
            "deepseek_v3",
            lambda t: t.update({Q_B: t[Q_B].astype(ml_dtypes.float8_e4m3fn)}),
            rf"{Q_B} in .* is float8_e4m3fn but config\.json has no quantization_config",
        ),
    ],
    ids=[
        "missing",
        "missing-expert",
        "wrong-shape",
        "transposed",
        "unknown",
        "unsupported-dtype",
        "missing-scale",
        "wrong-scale-shape",
        "unexpected-fp8",
    ],
)
def test_bad_tensors_are_named_with_their_file(copy, case, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(copy(case, change))


def test_damaged_files_are_named(copy):
    directory = copy()
    file = directory / "model.safetensors"
    content = file.read_bytes()
    first, *_, last = open_checkpoint(directory)
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"{last} in {file}: truncated"):
        load_model(directory)
    header_end = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[: header_end + 1])
    with pytest.raises(CheckpointError, match=rf"{first} in {file}: truncated"):
        load_model(directory)
    file.write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match=rf"{file}: .*not fully covered"):
        load_model(directory)
    file.write_bytes(content[:200])
    with pytest.raises(CheckpointError, match=rf"{file}: truncated in the header, at 200 bytes"):
        load_model(directory)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{file}: truncated in the header"):
        load_model(directory)
    file.write_bytes((4).to_bytes(8, "little") + b"oops")
    with pytest.raises(CheckpointError, match=rf"{file}: .*invalid JSON in header"):
        load_model(directory)
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors\.index\.json nor"
    ):
        load_model(directory)


def test_unsupported_models_are_named(copy):
    with pytest.raises(ValueError, match=r"config\.json: model_type='mixtral' is not supported"):
        load_model(copy(model_type="mixtral"))


def test_empty_safetensors_file(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert open_safetensors(tmp_path / "empty.safetensors") == {}


def test_progress_bar_is_for_terminals_unless_asked(capfd):
    load_model(checkpoint_dir("deepseek_v3"), progress=True)
    assert "Loading: 100%" in capfd.readouterr().err
    load_model(checkpoint_dir("deepseek_v3"))
    assert capfd.readouterr().err == ""


def test_the_mesh_in_context_is_used():
    with jax.set_mesh(make_mesh(2)):
        model = load_model(checkpoint_dir("deepseek_v3"))
    assert model.lm_head.kernel[...].sharding.spec == P(None, "model")


def test_meshes_that_do_not_divide_the_model_are_refused():
    with pytest.raises(ValueError, match="vocab_size=320 is not divisible by the 3 devices"):
        load_model(checkpoint_dir("deepseek_v3"), mesh=make_mesh(3))


def test_no_tensor_outlives_its_file(copy):
    """Values are copied out of the memory map: the checkpoint may go once it is loaded."""
    directory = copy()
    model = load_model(directory, dtype=jnp.float32)
    shutil.rmtree(directory)
    assert_same(model, load_model(checkpoint_dir("deepseek_v3"), dtype=jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="must be bfloat16, float16 or float32"):
        load_model(tmp_path, dtype=dtype)


def test_names_of_the_hub_are_no_directories():
    with pytest.raises(FileNotFoundError, match=r"deepseek-ai/x is no .*snapshot_download"):
        load_model("deepseek-ai/x")


def test_the_home_directory_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(checkpoint_dir("deepseek_v3"), tmp_path / "model")
    assert load_model("~/model").config.num_layers == 2


def test_without_a_mesh_parameters_lie_on_the_default_device():
    device = jax.devices()[3]
    with jax.default_device(device):
        model = load_model(checkpoint_dir("deepseek_v3"))
    (leaf, *_) = jax.tree.leaves(nnx.state(model))
    assert leaf.devices() == {device}
