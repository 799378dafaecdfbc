"""`ddpm-bench profile`: where the time of a sample goes, as figures, a trace for Perfetto and one page."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import machine, store
from bench.show import Table
from bench.timing import synchronize
from ddpm import runs
from ddpm.command_line import typed
from ddpm.commands.sampling_options import EngineName, Solver, Steps, contexts_of, table_of
from ddpm.distributed import pick_device
from ddpm.engines import choose
from ddpm.errors import BadInput
from ddpm.extras import need
from ddpm.files import json_text, read_json, replacing_all
from ddpm.inference import form_of, kept_form
from ddpm.networks import condition_shape
from ddpm.trajectory import Trajectory

FORMAT_VERSION = 1
DIGITS = 7  # of a figure that is kept
TRACE, PROFILE, REPORT = "trace.json", "profile.json", "report.html"


def profile(
    call: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="run folder")] = None,
    out: Annotated[Path | None, typer.Option(help=f"folder for {REPORT}, {PROFILE} and {TRACE}")] = None,
    engine: EngineName = "auto",
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 16,
    solver: Solver = None,
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(help="w of classifier-free guidance, 1 = none")] = 1.0,
    context: Annotated[str | None, typer.Option(help="class by name or number, v1,v2,.., or all")] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="how many are timed")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="0 <= seed < 2^63")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU [PyTorch's]")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help=f"two stored {PROFILE}, instead of a run")] = None,
) -> None:
    """Where the time of a sample goes: step latencies, parts, operators against measured ceilings, memory."""
    if set(typed(call)) == {"compare"}:
        comparison(*(_stored(path) for path in compare)).show()
        return
    if compare is not None or run is None or out is None:
        raise BadInput("profile: needs RUN and --out FOLDER, or --compare A.json B.json alone")
    need("matplotlib")
    torch.set_num_threads(threads or torch.get_num_threads())
    opened = runs.load_run(run)
    target = pick_device(device)
    options, table = table_of(opened, {"solver": solver, "steps": steps})
    contexts = _contexts(opened, context, guidance, batch)
    chosen = choose(engine, target, form=form_of(opened.model)).name
    with runs.held(out):
        # Heavy imports (the profiler's, the page's) wait until the input is known to be good.
        from bench.profiling.measure import Sampler, ceilings, measured
        from bench.profiling.page import render

        opened.model.to(target)
        contexts = None if contexts is None else contexts.to(target)
        load = machine.Load()
        began = time.perf_counter()
        guides = guidance != 1.0
        trajectory = Trajectory(opened.model, opened.schedule, table, engine=chosen, guided=guides, form=kept_form)
        synchronize(target)
        build_ms = (time.perf_counter() - began) * 1e3
        figures, trace = measured(Sampler(trajectory, batch, contexts, guidance, seed), trajectories)
        figures["latency"]["build_ms"] = build_ms
        network = {"kind": opened.config["network"], **opened.config["model"]}
        content = {
            "format_version": FORMAT_VERSION,
            "command": store.command(),
            "seed": seed,
            "machine": machine.describe(target),
            "run": {"name": run.resolve().name, "model": network, "schedule": opened.config["schedule"]},
            "recipe": {"engine": chosen, "batch": batch, "rows": batch * (2 if guides else 1), "steps": len(table)}
            | {"trajectories": trajectories, "solver": options["solver"], "guidance": guidance, "context": context}
            | {"dtype": "float32"},
            # Measured afterwards: its copies would be the process's peak of memory.
            "ceilings": ceilings(target),
            **figures,
        }
        content |= {"floor": floor(content), "load": load.record()}
        content = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"))
        events = json.dumps(trace, separators=(",", ":")) + "\n"
        texts = {REPORT: render(content), PROFILE: json_text(content), TRACE: events}
        paths = [out / name for name in texts]
        with replacing_all(paths) as partials:
            for partial, text in zip(partials, texts.values(), strict=True):
                partial.write_text(text, encoding="utf-8")
        machine.warn(machine.warning_of(content["load"]["others"]))
        print(summary(content))
        print(f"wrote {', '.join(map(str, paths))}")


def _contexts(run: runs.Run, context: str | None, guidance: float, batch: int) -> torch.Tensor | None:
    """[batch, ...] or None. Raises BadInput for guidance that has nothing to guide towards."""
    if not math.isfinite(guidance):
        raise BadInput(f"--guidance: got {guidance}, needs a finite number")
    if guidance != 1.0 and condition_shape(run.model) is None:
        raise BadInput(f"--guidance: got {guidance:g}, but {run.folder} was trained without classes, needs 1")
    if guidance != 1.0 and context is None:
        raise BadInput(f"--guidance: got {guidance:g} without --context, needs a class or all to guide towards")
    return contexts_of(run, context, 0, batch, "--batch")


NO_FLOOR = "none can be told: at the best rates measured here a step would take {:.1f} times as long as it did"


def best_rate(ceilings: Mapping[str, Any]) -> float:
    """The best GFLOP/s measured."""
    return max(ceilings["matmul_gflop_per_s"], ceilings["conv_gflop_per_s"])


def floor(content: Mapping[str, Any]) -> dict[str, Any]:
    """The two numbers: flops over the best rate, bytes over the copy bandwidth, of one step; the larger is the floor.

    Bytes are those of the operators as they are, each reading its inputs and writing its output once: fusing lowers
    them. Operators without a count are left out, `profiler.counted` says how much that is.
    """
    flops, moved = (sum(row[key] or 0.0 for row in content["operators"]) for key in ("flops", "bytes"))
    best = content["ceilings"]
    arithmetic, traffic = flops / best_rate(best) / 1e6, moved / best["copy_gb_per_s"] / 1e6
    return {
        "flops": flops,
        "bytes": moved,
        "arithmetic_ms": arithmetic,
        "traffic_ms": traffic,
        "binds": "arithmetic" if arithmetic >= traffic else "traffic",
        "share": max(arithmetic, traffic) / content["latency"]["step_ms"]["p50"],
    }


def _heading(content: Mapping[str, Any]) -> str:
    recipe = content["recipe"]
    guidance = f", guidance {recipe['guidance']:g}" if recipe["rows"] > recipe["batch"] else ""
    how = f"{recipe['engine']}, {recipe['batch']} images, {recipe['solver']}, {recipe['steps']} steps{guidance}"
    return f"{content['run']['name']}: {how}, {content['machine']['device']}"


def summary(content: Mapping[str, Any]) -> str:
    """The figures that a terminal shows: some fifteen lines."""
    step, memory = content["latency"]["step_ms"], content["memory"]
    bound, best = content["floor"], content["ceilings"]
    lines = [
        _heading(content),
        f"step     p50 {step['p50']:.2f}  p90 {step['p90']:.2f}  p99 {step['p99']:.2f}  max {step['max']:.2f} ms"
        f"   {content['latency']['images_per_s']:.3g} images/s",
        f"floor    arithmetic {bound['arithmetic_ms']:.2f} ms ({bound['flops'] / 1e9:.3g} GFLOP at "
        f"{best_rate(best):.0f} GFLOP/s), "
        f"traffic {bound['traffic_ms']:.2f} ms ({bound['bytes'] / 1e6:.4g} MB at {best['copy_gb_per_s']:.1f} GB/s)"
        if bound["share"] <= 1
        else f"floor    {NO_FLOOR.format(bound['share'])}",
        "where    " + "  ".join(f"{part['name']} {part['share']:.1%}" for part in content["parts"]),
        f"         (under the profiler, which makes a step {content['profiler']['overhead']:.2f} times as long)",
        f"{'operator':22s} {'calls':>6s} {'ms':>8s} {'share':>6s} {'GFLOP/s':>8s} {'GB/s':>7s}",
    ]
    for row in by_operator(content["operators"])[:6]:
        rates = (f"{row[key] / row['ms'] / 1e6:.1f}" if row[key] else "" for key in ("flops", "bytes"))
        figures = f"{row['calls']:6.0f} {row['ms']:8.3f} {row['share']:6.1%}"
        lines.append(f"{row['name']:22s} {figures} {next(rates):>8s} {next(rates):>7s}")
    within = memory["step_peak_bytes"]
    within = "" if within is None else f"a step allocates up to {within / 2**20:.1f} MiB, "
    lines.append(f"memory   {within}peak of the process {memory['peak_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)


def by_operator(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `operators` joined over shapes: name, calls, ms, share, flops, bytes; the most expensive first."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["name"]].append(row)
    joined = []
    for name, group in groups.items():
        values = {key: [row[key] for row in group] for key in ("calls", "ms", "share", "flops", "bytes")}
        joined.append({"name": name} | {key: None if None in some else sum(some) for key, some in values.items()})
    return sorted(joined, key=lambda row: -row["ms"])


def _stored(path: Path) -> dict[str, Any]:
    content = read_json(path)
    needs = f"needs a {PROFILE} that `ddpm-bench profile` wrote"
    if content.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: format_version {content.get('format_version')!r}, {needs}")
    try:
        _heading(content), _times(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: not whole ({type(error).__name__}: {error}), {needs}") from error
    return content


def _times(content: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(step, part or operator, its name) -> milliseconds a step."""
    found = {("step", "median, without the profiler"): content["latency"]["step_ms"]["p50"]}
    for kind, rows in (("part", content["parts"]), ("operator", by_operator(content["operators"]))):
        found |= {(kind, row["name"]): row["ms"] for row in rows}
    return {name: float(ms) for name, ms in found.items()}


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    """Two profiles beside each other: milliseconds a step, whole, by part and by operator, and the difference."""
    a, b = _times(first), _times(second)
    names = sorted({**a, **b}, key=itemgetter(0), reverse=True)  # step, parts, operators
    pairs = [(*name, a.get(name, 0.0), b.get(name, 0.0)) for name in names]
    rows = [[*name, f"{x:.3f}", f"{y:.3f}", f"{y - x:+.3f}", f"{y / x - 1:+.0%}" if x else ""] for *name, x, y in pairs]
    title = f"A: {_heading(first)}\nB: {_heading(second)}"
    return Table(("ms a step", "", "A", "B", "B - A", ""), "llrrrr", rows, title)
