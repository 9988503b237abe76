"""The plot that README shows, from a results file: sparse and dense decode."""

import json
import pathlib
from typing import Any

HEADS = (8, 16, 64)


def draw(results: pathlib.Path) -> pathlib.Path:
    """Draws the times of sparse decode with 8, 16 and 64 heads, and of dense decode with 16, next
    to `results`; returns the PNG's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report = json.loads(results.read_text())
    dense = [row for row in report["rows"] if row["op"] == "dense" and row["heads"] == 16]
    panels = len(HEADS) + bool(dense)
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 4), sharey=True)
    for axis, heads in zip(axes, HEADS, strict=False):
        rows = [
            row
            for row in report["rows"]
            if row["op"] == "sparse" and row["heads"] == heads and row["pool_tokens"] > 100_000
        ]
        rows.sort(key=lambda row: row["batch"])
        for key, label, style in (
            ("xla_us", "XLA, same run", "s--"),
            ("flashmla_us", "FlashMLA, 64 heads of q (recorded)", "o--"),
            ("end_to_end_us", "mla_jax", "o-"),
        ):
            points = [(row["batch"], row[key]) for row in rows if key in row]
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=label)
        floor = [row["bytes"] / report["ceilings"]["read_TBps"] / 1e6 for row in rows]
        axis.plot(
            [row["batch"] for row in rows], floor, ":", color="gray", label="bytes / read bandwidth"
        )
        axis.set(
            title=f"Sparse, top-k 2,048, {heads} heads per device",
            xlabel="query tokens",
            xscale="log",
            yscale="log",
        )
        axis.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    if dense:
        _draw_dense(axes[-1], dense, report["ceilings"]["read_TBps"])
        axes[-1].legend(loc="lower right", fontsize="small")
    axes[0].set_ylabel("microseconds")
    axes[1].legend(loc="upper left", fontsize="small")  # where few points are
    figure.suptitle(f"MLA decode, FP8 cache unless stated, {report['device']}")
    figure.tight_layout()
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_dense(axis: Any, rows: list[dict[str, Any]], read_tbps: float) -> None:
    def shape(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["batch"], row["kv_len"], row["lengths"]

    def is_bfloat16(row: dict[str, Any]) -> bool:
        return row.get("kv_cache_format") == "bfloat16"

    bfloat16 = {shape(row): row for row in rows if is_bfloat16(row)}
    rows = sorted((row for row in rows if not is_bfloat16(row)), key=lambda row: row["bytes"])
    labels = [
        f"{row['batch']} x {row['kv_len']:,}" if row["lengths"] == "equal" else row["lengths"]
        for row in rows
    ]
    for key, label, style in (
        ("xla_us", "XLA, same run", "s"),
        ("flashmla_us", "FlashMLA, bfloat16 cache (recorded)", "o"),
        ("end_to_end_us", "mla_jax", "D"),
    ):
        points = [(i, row[key]) for i, row in enumerate(rows) if key in row]
        axis.plot([x for x, _ in points], [y for _, y in points], style, label=label)
    if bfloat16:
        points = [(i, bfloat16[shape(row)]) for i, row in enumerate(rows) if shape(row) in bfloat16]
        times = [row["end_to_end_us"] for _, row in points]
        axis.plot([x for x, _ in points], times, "d", label="mla_jax, bfloat16 cache")
    floor = [row["bytes"] / read_tbps / 1e6 for row in rows]
    axis.plot(range(len(rows)), floor, "_", color="gray", label="bytes / read bandwidth")
    axis.set(title="Dense, 16 heads per device", xlabel="sequences x keys", yscale="log")
    axis.set_xticks(range(len(rows)), labels, rotation=20, ha="right", fontsize="small")
    axis.grid(alpha=0.3)
