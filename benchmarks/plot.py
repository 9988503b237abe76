"""The plot that README shows, from a results file."""

import json
import pathlib

HEADS = (8, 16)


def draw(results: pathlib.Path) -> pathlib.Path:
    """Draws time against batch for 8 and 16 heads next to `results`; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report = json.loads(results.read_text())
    figure, axes = plt.subplots(1, len(HEADS), figsize=(10, 4), sharey=True)
    for axis, heads in zip(axes, HEADS, strict=True):
        rows = [
            row
            for row in report["rows"]
            if row["op"] == "sparse" and row["heads"] == heads and row["pool_tokens"] > 100_000
        ]
        rows.sort(key=lambda row: row["batch"])
        for key, label, style in (
            ("xla_us", "XLA, same run", "s--"),
            ("flashmla_us", "FlashMLA, heads padded to 64 (recorded)", "o--"),
            ("end_to_end_us", "mla_jax", "o-"),
        ):
            points = [(row["batch"], row[key]) for row in rows if key in row]
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=label)
        floor = [row["bytes"] / report["ceilings"]["read_TBps"] / 1e6 for row in rows]
        axis.plot(
            [row["batch"] for row in rows], floor, ":", color="gray", label="bytes / read bandwidth"
        )
        axis.set(
            title=f"{heads} heads per device", xlabel="query tokens", xscale="log", yscale="log"
        )
        axis.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds")
    axes[-1].legend(loc="upper left", fontsize="small")
    figure.suptitle(f"Sparse MLA decode, FP8 cache, top-k 2,048, {report['device']}")
    figure.tight_layout()
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
