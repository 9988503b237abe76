"""The decode-step benchmark, small and on simulated devices: its programs, plan and table."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_step
from mla_jax.indexer import IndexerConfig
from mla_jax.modules import MLAConfig

SMALL = MLAConfig(
    hidden_size=64, num_heads=16, q_lora_rank=32, indexer=IndexerConfig(num_heads=2, topk=64)
)


def small_program(num_devices, config=SMALL, **options):
    return decode_step.Program(
        config,
        decode_step.make_mesh(num_devices),
        batch=2,
        num_layers=2,
        context=128,
        dtype=jnp.float32,
        implementation="xla",
        **options,
    )


def run(program):
    """The step's output, and its program."""
    compiled = program.compile()
    out, _ = compiled(program.make_params(), program.make_caches(), *program.make_inputs())
    return np.asarray(out), compiled


@pytest.fixture(scope="module")
def on_one_device():
    return run(small_program(1))[0]


@pytest.mark.parametrize("pad_heads", [False, True], ids=["native", "padded"])
@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_step_is_the_same_on_any_number_of_devices(num_devices, pad_heads, on_one_device):
    out, compiled = run(small_program(num_devices, pad_heads=pad_heads))
    np.testing.assert_allclose(out, on_one_device, rtol=1e-3, atol=1e-3)
    text = compiled.as_text()
    # One all-reduce a layer, that of o_proj, and nothing else.
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2
    assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", text)
    caches = 2 * 4 * 64 * 656
    assert compiled.memory_analysis().alias_size_in_bytes >= caches


@pytest.mark.parametrize("model", decode_step.MODELS)
@pytest.mark.parametrize(("size", "all_reduce"), [(2, True), (8, True), (8, False)])
def test_the_real_shapes_lower_for_hopper(model, size, all_reduce):
    for pad_heads in (False, True):
        case = decode_step.Case(model, size, 8, pad_heads, all_reduce)
        program = decode_step.program_of(case)
        traced = program.jitted().trace(*program.abstract_arguments())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
        assert len(kernels) >= 2  # the write and the attention
        has_64_heads = pad_heads or case.heads_per_device == 64
        assert any("x64x576xbf16" in line for line in kernels) == has_64_heads


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_the_plan_has_every_size_that_the_machine_holds(num_devices):
    cases = decode_step.plan(num_devices, "default")
    assert {case.tensor_parallel for case in cases} == {n for n in (1, 2, 4, 8) if n <= num_devices}
    assert len(set(cases)) == len(cases)
    # Nothing to pad where a device has 64 or 128 heads.
    assert all(case.heads_per_device < 64 for case in cases if case.pad_heads)
    # One device's part stands for the machines that are not there; once, with the flags.
    alone = [c for c in decode_step.plan(num_devices, "command buffers") if not c.all_reduce]
    assert {case.tensor_parallel for case in alone} == {n for n in (2, 4) if n <= num_devices} | {8}
    assert all(case.num_devices == 1 for case in alone)


def timeline(wait):
    """A GPU's two layers; it waits in the first one's all-reduce."""
    return [
        (0, 3000, "attend"),
        (3000, 4000 + wait, "ncclDevKernel_AllReduce"),
        (6000, 9000, "attend_1"),
        (9000, 10_000, "ncclDevKernel_AllReduce"),
    ]


def test_cases_are_measured_in_groups_until_the_time_is_up(monkeypatch):
    """With everything but the GPU's timeline."""
    monkeypatch.setattr(decode_step, "MODELS", {"small": SMALL})
    monkeypatch.setattr(decode_step, "gpu_timelines", lambda run: [run() and timeline(0)])
    monkeypatch.setattr(
        decode_step,
        "program_of",
        lambda case: small_program(
            case.num_devices, decode_step.layer_config(case), pad_heads=case.pad_heads
        ),
    )
    cases = [decode_step.Case("small", n, 2, pad) for n, pad in ((1, 0), (2, 0), (2, 1))]
    cases.append(decode_step.Case("small", 8, 2, all_reduce=False))
    rows = []
    decode_step.measure_cases(cases, "default", rows.append, deadline=np.inf)
    assert [(row["tensor_parallel"], row["pad_heads"]) for row in rows] == [
        (1, 0),
        (2, 0),
        (2, 1),
        (8, 0),
    ]
    assert all(row["us"] > 0 for row in rows)
    (first, *errors, other_numbers) = (row["error"] for row in rows)
    assert first is None
    assert other_numbers is None
    assert max(errors) < 1e-5
    assert decode_step.format_row(rows[-1])
    decode_step.measure_cases(cases, "default", rows.append, deadline=0.0)
    assert len(rows) == 4


def test_launches_and_communication_of_a_timeline():
    row = decode_step.timeline_row([timeline(0), timeline(1000)], layers=2, us=10.0)
    assert row["timeline_us"] == 5.0
    assert row["launches"] == 2
    assert row["communication_us"] == 1.25  # the wait counts
    assert row["share"] == 0.125
    assert row["kernels"] == {"attend": 1, "ncclDevKernel_AllReduce": 1}


def test_a_wrong_step_is_not_timed():
    case = decode_step.Case("GLM-5", 2, 8)
    right = np.ones((8, 1, 64))
    assert decode_step.check(right, right, case) == 0
    for wrong in (2 * right, np.full_like(right, np.nan)):
        with pytest.raises(RuntimeError, match=r"GLM-5.*wrong, not timed"):
            decode_step.check(wrong, right, case)


def test_report_and_table(tmp_path, monkeypatch):
    def row(*case, us, **timeline):
        case = decode_step.Case(*case)
        return {**dataclasses.asdict(case), "flags": "default", "us": us} | timeline

    lines = [
        {"device": "NVIDIA H200", "gpus": 2},
        row("GLM-5", 1, 1, us=41.26, communication_us=0.0, share=0.0),
        row("GLM-5", 2, 1, us=31.26, communication_us=8.0, share=0.256),
        row("GLM-5", 2, 128, us=131.26, communication_us=8.0, share=0.061),
        row("GLM-5", 2, 1, True, us=35.0, communication_us=8.0, share=0.228),
        row("GLM-5", 8, 1, False, False, us=20.0, communication_us=0.0, share=0.0),
    ]
    report = decode_step.make_report(lines, "abc")
    assert report["commit"] == "abc"
    assert not decode_step.is_complete(report)
    other = report | {"rows": [{"flags": "command buffers"}, {"flags": "default"}]}
    assert decode_step.merge(report, other)["rows"] == [
        {"flags": "command buffers"},
        *report["rows"],
    ]
    with pytest.raises(SystemExit, match="commit def of the output file is not abc"):
        decode_step.merge(report, other | {"commit": "def"})
    monkeypatch.setattr(decode_step, "RESULTS", tmp_path)
    (tmp_path / "decode_step_h200_x2.json").write_text(json.dumps(report))
    table = decode_step.markdown_table(decode_step.load_reports(), "default").splitlines()
    assert table[0] == "| model | GPUs | heads a GPU | batch 1 | batch 128 |"
    assert table[2:] == [
        "| GLM-5 | 1 | 64 | 41.3 |  |",
        "| GLM-5 | 2 | 32 | 31.3 (26%) | 131 (6%) |",
        "| GLM-5 | 2 | 32, padded | 35.0 (23%) |  |",
        "| GLM-5 | 1 of 8, no all-reduce | 8 | 20.0 |  |",
    ]


def test_nothing_measured_is_an_error():
    with pytest.raises(SystemExit, match="nothing was measured"):
        decode_step.make_report([{"device": "NVIDIA H200", "gpus": 2}], None)


def test_without_gpus_it_says_so(tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has GPUs")
    with pytest.raises(SystemExit, match="needs Hopper GPUs, found cpu"):
        decode_step.child("default", tmp_path / "rows.jsonl", 0.0)
