"""One decode step of the attention layer under tensor parallelism, on as many GPUs as there are.

    python3 -m benchmarks.decode_step           # -> results/decode_step_<device>_x<GPUs>.json
    python3 -m benchmarks.decode_step --table   # README's table, from those files; needs no GPU

A step is eight layers, unrolled inside one jit: projections, RoPE, cache write, sparse attention
over an FP8 cache, `o_proj` and its all-reduce, the residual. Weights (random bfloat16) and caches
are a layer's own. Each request has 16,384 tokens in the cache, on pages in random order, and
attends to 2,048 of them. Those indices are given, as to GLM's layers that share another's: the
indexer is XLA code that every device repeats in full, so it says nothing about the heads.

Rows of `"all_reduce": false` are what one device computes of a split over `tensor_parallel`
devices, on one GPU and without the sum: they stand for numbers of devices that are not there, too.

`us` is wall-clock time per layer: a loop that dispatches steps one after the other, as a decode
loop does, the median over several loops, programs warm. XLA runs without command buffers while it
is profiled, so the GPU's timeline does not show them. It gives the rest: `timeline_us`, the span
per layer when profiled; `launches`, kernels and copies per layer and GPU; `communication_us`, time
per layer in all-reduce kernels, the wait for the slower GPU included, mean over the GPUs; and
`share`, that time in `us`.

Every set of flags has a process of its own. Before a case is timed, its result is compared with
that of the first case of the same numbers in the process: fewer devices, or heads that are not
padded. `error` is null for the first.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.timing import gpu_timelines
from mla_jax.attention import mla_sparse_attention
from mla_jax.cache import LatentCache, logical_to_physical, quantize
from mla_jax.dispatch import Implementation
from mla_jax.models import presets
from mla_jax.modules import MLAConfig, SparseCache, SparseMultiHeadLatentAttention
from mla_jax.sharding import tensor_parallel

RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = {
    "DeepSeek V3.2": presets.DEEPSEEK_V32.attention,
    "GLM-5": presets.GLM_5.attention,
}
BATCHES = (1, 8, 64, 128)
NUM_LAYERS = 8
CONTEXT = 16_384
PAGE_SIZE = 64
_GRAPHS = (
    "--xla_gpu_enable_command_buffer="
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL,DYNAMIC_SLICE_FUSION"
)
FLAGS = {
    "command buffers": f"{_GRAPHS} --xla_gpu_graph_min_graph_size=1",
    "default": "",
    "command buffers, collectives": f"{_GRAPHS},COLLECTIVES --xla_gpu_graph_min_graph_size=1",
}
_COMMUNICATION = re.compile("nccl|all.?reduce", re.IGNORECASE)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a model's layer, its heads split, padded or not.

    Attributes:
      model: key of `MODELS`.
      tensor_parallel: number of devices that the heads are split over.
      batch: requests, one new token each.
      pad_heads: pad each device's heads to 64 or 128.
      all_reduce: False for one device's part alone, on one GPU.
    """

    model: str
    tensor_parallel: int
    batch: int
    pad_heads: bool = False
    all_reduce: bool = True

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel if self.all_reduce else 1

    @property
    def heads_per_device(self) -> int:
        return MODELS[self.model].num_heads // self.tensor_parallel

    @property
    def same_numbers(self) -> tuple[Any, ...]:
        """Equal for cases that compute the same."""
        return self.model, self.batch, self.all_reduce or self.tensor_parallel


def plan(num_devices: int, flags: str) -> list[Case]:
    """The rows of a machine, in the order of their measuring; expected results come first."""

    def cases(model: str, size: int, **options: bool) -> Iterator[Case]:
        heads = MODELS[model].num_heads // size
        for batch in BATCHES:
            for pad_heads in (False, True) if heads not in (64, 128) else (False,):
                yield Case(model, size, batch, pad_heads, **options)

    found = []
    for size in (1, 2, 4, 8):
        for model in MODELS:
            if size <= num_devices and not (size == 1 and "collectives" in flags):
                found += cases(model, size)
            if flags == "command buffers" and (1 < size <= num_devices or size == 8):
                found += cases(model, size, all_reduce=False)
    return sorted(found, key=_order)


def _order(case: Case) -> tuple[bool, int, int]:
    """The whole machine first, then one device's part alone; cases that share caches together."""
    return not case.all_reduce, case.tensor_parallel, case.batch


# ------------------------------------------------------------------------------------- the program


class PaddedAttention(SparseMultiHeadLatentAttention):
    """The layer with each device's heads padded to 64 or 128, as other kernels would need it."""

    def _op(self, op: Callable[..., Any]) -> Callable[..., Any]:
        assert op is mla_sparse_attention
        mesh, axis = self.parallelism.current_mesh(), self.parallelism.axis
        padded = tensor_parallel(op, mesh=mesh, head_axis=axis, pad_heads=True)
        return functools.partial(
            padded, sm_scale=self.config.sm_scale, implementation=self.implementation
        )


def layer_config(case: Case) -> MLAConfig:
    """The layer's sizes; those of one device's part without the all-reduce."""
    config = MODELS[case.model]
    return (
        config if case.all_reduce else dataclasses.replace(config, num_heads=case.heads_per_device)
    )


class Program:
    """A step of a case on a mesh: what it takes, and what is jitted.

    Args:
      config: the layer's sizes.
      mesh: devices to split the heads over, axis "model".
      batch: requests.
      pad_heads: pad each device's heads.
      num_layers: layers of a step.
      context: tokens of each request in the cache.
      implementation: of attention and the cache write.
    """

    def __init__(
        self,
        config: MLAConfig,
        mesh: Mesh,
        batch: int,
        *,
        pad_heads: bool = False,
        num_layers: int = NUM_LAYERS,
        context: int = CONTEXT,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: Implementation | None = None,
    ):
        assert config.indexer is not None
        self.num_layers = num_layers
        num_pages = batch * context // PAGE_SIZE
        self._cache_sizes = num_pages, config.kv_lora_rank, config.qk_rope_head_dim
        topk = min(config.indexer.topk, context)
        self._input_sizes = batch, context, topk, config.hidden_size
        layer = PaddedAttention if pad_heads else SparseMultiHeadLatentAttention
        self._make_layer = functools.partial(
            layer,
            config,
            has_indexer=False,
            mesh=mesh,
            dtype=dtype,
            param_dtype=dtype,
            implementation=implementation,
        )
        self.graphdef, params = nnx.split(
            nnx.eval_shape(lambda: self._make_layer(rngs=nnx.Rngs(0)))
        )
        self._param_shardings = nnx.get_named_sharding(params, mesh)
        self._abstract_params = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            params,
            self._param_shardings,
        )
        self.replicated = NamedSharding(mesh, P())

    def step(self, params: Any, caches: Any, x: Any, tokens: Any) -> Any:
        """`(x, caches)` after `num_layers` layers; `tokens` are the layers' other arguments."""

        @jax.jit  # traced once, inlined by XLA
        def layer(params: Any, cache: SparseCache, x: jax.Array) -> tuple[jax.Array, SparseCache]:
            out, cache, _ = nnx.merge(self.graphdef, params)(x, cache, **tokens)
            return x + out, cache

        new_caches = []
        for layer_params, cache in zip(params, caches, strict=True):
            x, cache = layer(layer_params, cache, x)
            new_caches.append(cache)
        return x, new_caches

    def jitted(self) -> Any:
        # The outputs' sharding is said, so that donated caches keep theirs.
        return jax.jit(self.step, donate_argnames="caches", out_shardings=self.replicated)

    def compile(self) -> jax.stages.Compiled:
        return self.jitted().lower(*self.abstract_arguments()).compile()

    def abstract_arguments(self) -> tuple[Any, ...]:
        def place(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), tree
            )

        key = jax.random.key(0)
        cache = place(jax.eval_shape(functools.partial(_make_cache, *self._cache_sizes), key))
        params = [self._abstract_params] * self.num_layers
        inputs = place(jax.eval_shape(functools.partial(_make_inputs, *self._input_sizes), key))
        return params, [cache] * self.num_layers, *inputs

    def make_params(self) -> list[Any]:
        """Random weights; the same whatever the mesh."""
        return [self.makers[0](jax.random.key(i)) for i in range(self.num_layers)]

    def make_caches(self) -> list[SparseCache]:
        return [self.makers[1](jax.random.key(100 + i)) for i in range(self.num_layers)]

    def make_inputs(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.makers[2](jax.random.key(200))

    @functools.cached_property
    def makers(self) -> tuple[jax.stages.Compiled, ...]:
        """What makes a layer's weights, its cache, and the inputs, of a key; compiled."""

        def make_params(key: jax.Array) -> Any:
            return nnx.split(self._make_layer(rngs=nnx.Rngs(key)))[1]

        def compile(make: Callable[..., Any], out_shardings: Any) -> jax.stages.Compiled:
            return jax.jit(make, out_shardings=out_shardings).lower(jax.random.key(0)).compile()

        return (
            compile(make_params, self._param_shardings),
            compile(functools.partial(_make_cache, *self._cache_sizes), self.replicated),
            compile(functools.partial(_make_inputs, *self._input_sizes), self.replicated),
        )


def _make_cache(
    num_pages: int, kv_lora_rank: int, qk_rope_head_dim: int, key: jax.Array
) -> SparseCache:
    """Random latents whose 128-dim tiles differ in size, in every slot."""
    keys = jax.random.split(key, 3)
    shape = num_pages, PAGE_SIZE, kv_lora_rank // 128
    tiles = jnp.exp2(jax.random.uniform(keys[0], (*shape, 1), minval=-2, maxval=1))
    kv_c = jax.random.normal(keys[1], (*shape, 128), jnp.bfloat16) * tiles.astype(jnp.bfloat16)
    k_pe = jax.random.normal(keys[2], (*shape[:2], qk_rope_head_dim), jnp.bfloat16)
    rows = quantize(kv_c.reshape(*shape[:2], kv_lora_rank), k_pe)
    return SparseCache(LatentCache(rows, kv_lora_rank, qk_rope_head_dim), None)


def _make_inputs(
    batch: int, context: int, topk: int, hidden_size: int, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """bfloat16 x `[batch, 1, hidden_size]`, and where its tokens stand and attend."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (batch, 1, hidden_size), jnp.bfloat16)
    pages = jax.random.permutation(keys[1], batch * context // PAGE_SIZE).astype(jnp.int32)
    page_indices = pages.reshape(batch, -1)
    order = jax.random.uniform(keys[2], (batch, context))
    positions = jnp.argsort(order, axis=1)[:, :topk].astype(jnp.int32)
    return x, {
        "page_indices": page_indices,
        "kv_lens": jnp.full(batch, context, jnp.int32),
        "topk_indices": logical_to_physical(page_indices, positions, PAGE_SIZE),
    }


def make_mesh(num_devices: int) -> Mesh:
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("model",), axis_types=(AxisType.Auto,), devices=devices)


def program_of(case: Case) -> Program:
    return Program(
        layer_config(case),
        make_mesh(case.num_devices),
        case.batch,
        pad_heads=case.pad_heads,
        implementation="mosaic_gpu",
    )


# ----------------------------------------------------------------------------------------- timing


def measure(compiled: Any, params: Any, caches: Any, inputs: Any) -> tuple[Row, Any]:
    """Times warm steps; returns the row and the caches, which every step donates."""

    def run(steps: int) -> float:
        nonlocal caches
        started = time.perf_counter()
        for _ in range(steps):
            _, caches = compiled(params, caches, *inputs)
        jax.block_until_ready(caches)
        return time.perf_counter() - started

    run(3)
    steps = max(5, min(100, int(0.03 / (run(3) / 3))))
    walls = [run(steps) / steps for _ in range(7)]
    profiled_steps = 4
    timelines = gpu_timelines(lambda: run(profiled_steps))
    per_layer = 1e6 / NUM_LAYERS
    us = float(np.median(walls)) * per_layer
    return {"us": us, "best_us": min(walls) * per_layer} | timeline_row(
        timelines, profiled_steps * NUM_LAYERS, us
    ), caches


def timeline_row(timelines: Sequence[Any], layers: int, us: float) -> Row:
    """Launches, span and communication per layer, of one list of events per GPU."""
    spans, communication, names = [], [], collections.Counter()
    for events in timelines:
        spans.append(max(end for _, end, _ in events) - events[0][0])
        summed = [end - start for start, end, name in events if _COMMUNICATION.search(name)]
        communication.append(sum(summed))
        names.update(re.sub(r"[_.]\d+(?=_|$)", "", name) for *_, name in events)
    communication_us = float(np.mean(communication)) / layers / 1e3
    return {
        "timeline_us": max(spans) / layers / 1e3,
        "launches": names.total() / len(timelines) / layers,
        "communication_us": communication_us,
        "share": communication_us / us,
        "kernels": {name: n / len(timelines) / layers for name, n in names.most_common()},
    }


def check(out: np.ndarray, expected: np.ndarray, case: Case) -> float:
    """Relative error of the step's output against a case of the same numbers."""
    out, expected = out.astype(np.float32), expected.astype(np.float32)
    error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
    if not error < 2e-2:  # bfloat16 sums of eight layers in another order
        raise RuntimeError(f"{error=:.1e} of {case}: the step is wrong, not timed")
    return error


def measure_cases(
    cases: Sequence[Case], flags: str, write: Callable[[Row], None], deadline: float
) -> None:
    """Measures while there is time. Cases of one split and batch are compiled together."""
    expected: dict[Any, np.ndarray] = {}
    params: dict[Any, Any] = {}
    for (*split, _), group in itertools.groupby(cases, key=_order):
        programs = {case: program_of(case) for case in group}
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:  # all done before one is timed
            makers = [pool.submit(lambda p: p.makers, program) for program in programs.values()]
            steps = [pool.submit(program.compile) for program in programs.values()]
        compiled = {case: step.result() for case, step in zip(programs, steps, strict=True)}
        for future in makers:
            future.result()
        seconds = time.perf_counter() - started
        print(f"{flags}: {len(programs)} programs in {seconds:.1f} s", flush=True)
        params = {key: value for key, value in params.items() if key[1:] == (*split,)}
        caches = None
        for case, program in programs.items():
            if time.time() > deadline:
                print(f"{flags}: out of time at {case}", flush=True)
                return
            key = case.model, *split
            if key not in params:
                params[key] = program.make_params()
            inputs = program.make_inputs()
            out, caches = compiled[case](params[key], caches or program.make_caches(), *inputs)
            out = np.asarray(out)
            first = expected.setdefault(case.same_numbers, out)
            error = None if first is out else check(out, first, case)
            row, caches = measure(compiled[case], params[key], caches, inputs)
            write({**dataclasses.asdict(case), "flags": flags, **row, "error": error})


# --------------------------------------------------------------------------------------- processes


def child(flags: str, rows: pathlib.Path, deadline: float) -> None:
    """Measures one set of flags: a JSON line for the machine, then one for each row."""
    devices = jax.devices()
    if devices[0].platform != "gpu":
        raise SystemExit(f"needs Hopper GPUs, found {devices[0].platform}; --table does not")
    with rows.open("w") as file:

        def write(row: Row) -> None:
            print(json.dumps(row), file=file, flush=True)
            if "us" in row:
                print(format_row(row), flush=True)

        cases = plan(len(devices), flags)
        write({"device": devices[0].device_kind, "gpus": len(devices)})
        measure_cases(cases, flags, write, deadline)


def run_child(flags: str, rows: pathlib.Path, deadline: float) -> list[Row]:
    """`child` in a process with these flags; what it wrote, also where it was cut off."""
    # The cache holds what autotuning found: all sets of flags get the same choices.
    env = {"JAX_COMPILATION_CACHE_DIR": str(rows.parent / "cache")} | os.environ
    env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[flags]}".strip()
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    command = [sys.executable, "-m", "benchmarks.decode_step", "--child", flags, str(rows)]
    try:
        # A deadlock of the GPUs must not outlast the deadline by much.
        limit = deadline + 20 - time.time()
        result = subprocess.run([*command, str(deadline)], env=env, timeout=limit, check=False)
        print(f"{flags}: exit status {result.returncode}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{flags}: killed at the time limit", flush=True)
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


# ----------------------------------------------------------------------------------------- output


def make_report(lines: Sequence[Row], commit: str | None) -> Row:
    """The JSON file's content, of the children's lines."""
    heads = [line for line in lines if "gpus" in line]
    rows = [line for line in lines if "us" in line]
    if not rows:
        raise SystemExit("nothing was measured")
    return {
        "device": heads[0]["device"],
        "gpus": heads[0]["gpus"],
        "date": datetime.date.today().isoformat(),
        "commit": commit or _current_commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "layers": NUM_LAYERS,
        "context": CONTEXT,
        "flags": FLAGS,
        "rows": [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ],
    }


def merge(report: Row, previous: Row) -> Row:
    """`report` with the rows that `previous` has of other flags; both of one machine and commit."""
    for key in ("device", "gpus", "commit", "versions"):
        if report[key] != previous[key]:
            raise SystemExit(f"{key} {previous[key]} of the output file is not {report[key]}")
    measured = {row["flags"] for row in report["rows"]}
    kept = [row for row in previous["rows"] if row["flags"] not in measured]
    return report | {
        "rows": sorted(kept + report["rows"], key=lambda r: [*FLAGS].index(r["flags"]))
    }


def is_complete(report: Row) -> bool:
    return len(report["rows"]) == sum(len(plan(report["gpus"], flags)) for flags in FLAGS)


def _current_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def format_row(row: Row) -> str:
    split = f"/{row['tensor_parallel']}" + ("" if row["all_reduce"] else " alone")
    return (
        f"{row['model']:>13}{split:8} {row['batch']:>4} {'padded' if row['pad_heads'] else '':6}"
        f" {row['us']:>8.1f} us  timeline {row['timeline_us']:>8.1f}"
        f"  launches {row['launches']:>5.1f}  communication {row['communication_us']:>6.1f} us"
        f" {100 * row['share']:>4.1f}%  {row['flags']}"
    )


def markdown_table(reports: Sequence[Row], flags: str = "command buffers") -> str:
    """README's table: microseconds per layer, and the share of communication where there is any.

    A line for each model, number of GPUs and padding; rows of one device's part alone are marked.
    """
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    batches = sorted({row["batch"] for report in reports for row in report["rows"]})
    for report in reports:
        for row in report["rows"]:
            if row["flags"] != flags:
                continue
            heads = MODELS[row["model"]].num_heads // row["tensor_parallel"]
            gpus = (
                f"{row['tensor_parallel']}"
                if row["all_reduce"]
                else (f"1 of {row['tensor_parallel']}, no all-reduce")
            )
            key = (
                list(MODELS).index(row["model"]),
                not row["all_reduce"],
                row["tensor_parallel"],
                row["pad_heads"],
                row["model"],
                gpus,
                f"{heads}, padded" if row["pad_heads"] else f"{heads}",
            )
            share = f" ({100 * row['share']:.0f}%)" if row["communication_us"] else ""
            # The same row of a larger machine's report gives way to the smaller one's.
            lines.setdefault(key, {}).setdefault(row["batch"], f"{_significant(row['us'])}{share}")
    titles = ["model", "GPUs", "heads a GPU", *(f"batch {batch}" for batch in batches)]
    table = [titles, ["---"] * len(titles)]
    for key in sorted(lines):
        table.append([*key[4:], *(lines[key].get(batch, "") for batch in batches)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _significant(us: float) -> str:
    return f"{us:.0f}" if us >= 99.5 else f"{us:.1f}"


def load_reports() -> list[Row]:
    """All results, machines of fewer GPUs first."""
    reports = [json.loads(path.read_text()) for path in RESULTS.glob("decode_step_*.json")]
    return sorted(reports, key=lambda report: report["gpus"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.decode_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="print README's table and stop")
    parser.add_argument(
        "--flags", choices=FLAGS, action="append", help="repeatable; into the file there is"
    )
    parser.add_argument("--output", type=pathlib.Path, help="default: in results/")
    parser.add_argument("--commit", help="recorded in the JSON; default: git's HEAD")
    parser.add_argument("--time-limit", type=float, default=1200, help="seconds; default 1200")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        for flags in FLAGS:
            print(f"{flags}:\n\n{markdown_table(load_reports(), flags)}\n")
        return
    if options.child:
        flags, rows, deadline = options.child
        child(flags, pathlib.Path(rows), float(deadline))
        return
    with tempfile.TemporaryDirectory() as directory:
        deadline = time.time() + options.time_limit
        lines = []
        for i, flags in enumerate(options.flags or FLAGS):
            lines += run_child(flags, pathlib.Path(directory, f"{i}.jsonl"), deadline)
    report = make_report(lines, options.commit)
    device = report["device"].lower().replace("nvidia", "").split()[0]
    output = options.output or RESULTS / f"decode_step_{device}_x{report['gpus']}.json"
    if options.flags and output.exists():
        report = merge(report, json.loads(output.read_text()))
    report["complete"] = is_complete(report)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown_table([report]))
    print(f"{output}: {len(report['rows'])} rows, complete: {report['complete']}")


if __name__ == "__main__":
    main()
