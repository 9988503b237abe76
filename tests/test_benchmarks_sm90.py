"""The benchmark's bookkeeping, on made-up timelines: no GPU needed."""

import json

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import plot, timing


def timeline(calls, kernels, *, gap=1000.0):
    """Back-to-back calls of (name, duration ns) kernels, `gap` ns apart."""
    now, events = 0.0, []
    for _ in range(calls):
        for name, duration in kernels:
            events.append((now, now + duration, name))
            now += duration + gap
    return events


def test_a_call_spans_from_its_first_kernel_to_its_last():
    result = timing._timing(timeline(6, [("attend", 5000), ("merge", 2000)]), calls=3, repeats=2)
    assert result.us == result.best_us == pytest.approx(8.0)
    assert result.kernels == (("attend", 5.0), ("merge", 2.0))
    assert result.end_to_end_us == pytest.approx((3 * 8 + 2 * 1) / 3)


def test_calls_of_unlike_kernels_are_timed_as_a_chain():
    events = timeline(2, [("a", 1000), ("b", 1000), ("a", 1000), ("a", 1000)])
    result = timing._timing(events, calls=2, repeats=2)
    assert result.kernels == ()
    assert result.us == result.end_to_end_us == pytest.approx(7 / 2)


def test_a_timeline_that_does_not_repeat_is_refused():
    with pytest.raises(RuntimeError, match="do not divide"):
        timing._timing(timeline(5, [("a", 1000)]), calls=1, repeats=2)


def test_rates_and_ratios_of_a_row():
    row = {"op": "sparse", "us": 10.0, "bytes": 20_000_000, "flops": 10**9, "xla_us": 50.0}
    row = command.complete(row, {"read_TBps": 4.0, "copy_TBps": 1.0})
    assert (row["TBps"], row["percent_of_bandwidth"], row["TFLOPps"]) == (2.0, 50.0, 100.0)
    assert row["xla_ratio"] == 5.0
    assert len(command.format_row(row)) == len(command.format_row(None))


@pytest.mark.parametrize(("heads", "batch", "expected"), [(8, 128, 123.1), (64, 128, 116.3)])
def test_recorded_figure_includes_the_padding_where_it_pads(heads, batch, expected):
    row = command.recorded_flashmla(heads, batch, command.POOL_TOKENS)
    assert row == {"flashmla_us": expected}
    assert command.recorded_flashmla(heads, 77, command.POOL_TOKENS) == {}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 1, [4096] * 128), 209.8),
        ((8, 1, [4096] * 128), 209.8),
        ((128, 2, [4096] * 128), 486.9),
        ((16, 1, [4096, 1]), None),
        ((16, 1, [4095] * 128), None),
    ],
    ids=str,
)
def test_recorded_dense_figure_is_of_the_same_shape(shape, expected):
    assert command.recorded_dense_flashmla(*shape).get("flashmla_us") == expected


def test_page_tables_use_no_page_twice():
    table = np.asarray(command.make_page_table(0, [100, 64, 1], 64 * 8))
    assert table.shape == (3, 2)
    used = [*table[0], table[1, 0], table[2, 0]]
    assert len(set(used)) == len(used)
    assert max(used) < 8


def test_draws_the_plot_from_the_results_alone(tmp_path):
    rows = [
        {
            "op": "sparse",
            "heads": heads,
            "batch": batch,
            "pool_tokens": command.POOL_TOKENS,
            "us": 5.0 + batch,
            "flashmla_us": 20.0 + batch,
            "bytes": 10**7 * batch,
        }
        for heads in plot.HEADS
        for batch in (1, 128)
    ]
    dense = {"op": "dense", "heads": 16, "batch": 8, "kv_len": 2048, "lengths": "equal"}
    dense |= {"us": 10.0, "end_to_end_us": 11.0, "flashmla_us": 16.7, "bytes": 10**7}
    results = tmp_path / "results.json"
    bfloat16 = dense | {"kv_cache_format": "bfloat16"}
    for shown in (rows, [*rows, dense, bfloat16, dense | {"lengths": "log-uniform"}]):
        report = {"device": "test", "ceilings": {"read_TBps": 3.0}, "rows": shown}
        results.write_text(json.dumps(report))
        assert plot.draw(results).stat().st_size > 1000
