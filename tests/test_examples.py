import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.huggingface import checkpoint_dir, expected

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decode():
    return load_example("decode")


def run_cli(*args, **env):
    """decode.py as a user starts it; nothing but `env` says how many devices there are."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "decode.py"), *map(str, args)],
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES.parent)} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_arguments_it_runs_on_eight_simulated_devices():
    result = run_cli()
    assert result.returncode == 0, result.stderr
    assert "8 of 8 (cpu), 16 heads: 2 a device" in result.stdout
    assert "tokens/s" in result.stdout
    assert "656 bytes a token and layer in fp8_ds_mla; bfloat16 has 1,152 (1.76x)" in result.stdout


def test_too_few_devices_say_how_to_simulate_them():
    result = run_cli("--tensor-parallel", 8)
    assert result.returncode == 2
    assert "--tensor-parallel 8 needs 8 devices, but there are 1 (cpu)" in result.stderr
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=8" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("case", ["deepseek_v3", "glm_moe_dsa"])
def test_output_file_holds_what_transformers_generates(case, tmp_path, decode, capsys):
    data = expected(case)
    prompt_file, output_file = tmp_path / "prompts.json", tmp_path / "output.json"
    prompt_file.write_text(json.dumps(data["input_ids"].tolist()))
    code = decode.main(
        [f"--checkpoint={checkpoint_dir(case)}", f"--prompt-ids={prompt_file}",
         "--max-new-tokens=24", "--kv-cache-format=float32", "--dtype=float32",
         "--tensor-parallel=8", "--page-size=16", "--implementation=xla",
         f"--output={output_file}"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    output = json.loads(output_file.read_text())
    assert set(output) == {
        "generated", "prefill_logits_shape", "tokens_per_second", "kv_cache_bytes_per_token"
    }  # fmt: skip
    np.testing.assert_array_equal(output["generated"], data["generated"])
    assert output["prefill_logits_shape"] == [2, 320]
    assert output["tokens_per_second"] > 0
    assert output["kv_cache_bytes_per_token"] == 2304
    # All tokens were printed, in order, as they came.
    lines = [line.split("[0] ")[1] for line in printed.out.splitlines() if "[0] " in line]
    assert [int(token) for line in lines for token in line.split()] == output["generated"][0]


def test_all_devices_that_divide_the_model_are_used(decode):
    config = decode.ModelConfig.from_file(checkpoint_dir("deepseek_v3") / "config.json")
    assert decode.make_mesh(config, None).size == len(jax.devices()) == 8
    assert decode.make_mesh(config, 2).size == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint=/nowhere"], "config.json"),
        (["--tensor-parallel=3"], "not divisible by the 3 devices"),
        (["--tensor-parallel=0"], "--tensor-parallel 0 must be at least 1"),
        (["--prompt-ids=/nowhere.json"], "/nowhere.json"),
        (["--max-new-tokens=0"], "max_new_tokens=0 must be a positive integer"),
        (["--page-size=0"], "page_size=0"),
        (["--implementation=mosaic_gpu"], "mosaic_gpu needs a Hopper GPU; this machine's"),
    ],
)
def test_mistakes_are_one_line(args, message, decode, capsys):
    assert decode.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("content", ["{}", "[[1, 2.5]]", "[3]", "[["])
def test_prompt_files_are_checked(content, tmp_path, decode, capsys):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    assert decode.main([f"--prompt-ids={file}"]) == 2
    assert str(file) in capsys.readouterr().err


def test_ops_example(capsys):
    runpy.run_path(str(EXAMPLES / "ops.py"), run_name="__main__")
    assert "8 devices, 8 heads each, 8 keys: (2, 1, 64, 512)" in capsys.readouterr().out


def test_tensor_parallel_example(capsys):
    runpy.run_path(str(EXAMPLES / "tensor_parallel.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "8 devices" in output
    assert "(2, 1, 512)" in output
