"""Draw the README's figures from the reports in results/: `python benchmarks/plot.py [OUT_DIR]`. Needs matplotlib.

push.svg   one push by method, a group of bars per shape, on a logarithmic scale; the dashed line is the floor: a
           push of nothing plus a device copy of the largest shard
loop.svg   the reward of the default rehearsal, five seeds; and where the time of a step goes on a GPU
learn.svg  SmolLM2 and sums, three seeds, beside TRL: held-out sums that are right, and the mean reward of each step
shards.svg what shard_scaling.py computes for 8 GPUs, and the copies that were timed, of the same models
"""

import statistics
import sys
from pathlib import Path

import matplotlib
import tables

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "rlhf-colocate", "font.size": 9}  # the same file for the same figures
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    "vllm": "#9aa5b1",
    "vllm-packed": "#c3cad2",
    "simple": "#6b9bd1",
    "bucket": "#a8c8ea",
    "recorded": "#e07b39",
}
PHASES = {"rollout": "#6b9bd1", "sleep": "#4c566a", "train": "#a3be8c", "wake": "#b48ead", "push": "#e07b39"}
LEARNERS = [("#e07b39", "-"), ("#d9a441", ":"), ("#4c566a", "--")]  # in the order of their reports
PHASES |= {"wake KV": "#ebcb8b"}
SHARDS = {1: "black", 2: "#a3be8c", 4: "#6b9bd1", 8: "#b48ead"}  # by the trainers in a set
ORDERS = {"by TP rank": "-", "by GPU": ":"}  # of shard_scaling.py


def draw_pushes():
    shapes = tables.bench_shapes()
    figure, axis = plt.subplots(figsize=(8, 0.4 + 1.25 * len(shapes)), layout="constrained")
    top = 0.0
    labels = []
    for (hardware, shape), rows in shapes.items():
        recorded = rows["recorded"]
        floor = tables.noop_ms(recorded) + recorded["device_copy_ms"]
        drawn = [m for m in COLOURS if m in rows]
        for i, method in enumerate(drawn):
            ms = rows[method]["wall_ms_p50"]
            axis.barh(top + i, ms, height=0.85, color=COLOURS[method])
            axis.text(ms * 1.03, top + i, f"{tables.METHODS[method]}  {ms:.3g} ms", va="center", fontsize=8)
        axis.plot([floor, floor], [top - 0.5, top + len(drawn) - 0.5], "--", color="black", linewidth=1)
        labels.append((top + (len(drawn) - 1) / 2, f"{shape}\n{hardware}"))
        top += len(drawn) + 1
    axis.set_yticks([y for y, _ in labels], [text for _, text in labels])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(1, 4 * axis.get_xlim()[1])
    axis.set_xlabel("one push, wall time in ms (median of 30), logarithmic; dashed: no-op + device copy")
    return figure


def draw_loops():
    runs = {n: r for n, r in tables.load("loop-?xh100-*.json").items() if r.get("steps")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.5 * len(runs)), layout="constrained")
    for name, r in tables.load("loop-rehearsal-seed*.json").items():
        left.plot([s["step"] for s in r["steps"]], [s["reward"] for s in r["steps"]], label=f"seed {name[-1]}")
    left.set(xlabel="step (rehearsal on two cores, default run)", ylabel="mean reward", ylim=(0, 1.02))
    left.legend(fontsize=8, frameon=False)
    for y, r in enumerate(runs.values()):
        start = 0.0
        for phase, colour in PHASES.items():
            seconds = statistics.median(s["seconds"].get(phase, 0) for s in r["steps"])
            right.barh(y, seconds, left=start, color=colour, label=phase if y == 0 else None, height=0.6)
            start += seconds
    names = [f"{n.split('-', 2)[2]}\n{tables.hardware(r)}" for n, r in runs.items()]
    right.set_yticks(range(len(runs)), names)
    right.set_xlabel("seconds of a step, by phase (medians)")
    right.legend(fontsize=8, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.35))
    return figure


def draw_learned():
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    styles = iter(LEARNERS)
    found = {}
    for r in tables.load("learn-smollm2*.json").values():
        by = tables.learner_of(r)
        style = {"linewidth": 1}
        if by not in found:
            found[by] = next(styles)
            style["label"] = f"{by}, three seeds"
        style["color"], style["linestyle"] = found[by]
        shares = [e["arithmetic.py:right"] for e in r["evals"]]
        left.plot([e["step"] for e in r["evals"]], shares, marker=".", **style)
        means = [statistics.fmean(r["rewards"][i : i + 5]) for i in range(0, len(r["rewards"]), 5)]
        right.plot(range(3, 5 * len(means), 5), means, **style)
    left.set(xlabel="step", ylabel="held-out sums that are right", ylim=(0, 1))
    right.set(xlabel="step", ylabel="reward, means of 5 steps")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2, loc="outside lower center")
    return figure


def draw_shards():
    rows = tables.scaling_rows(8)
    models = list(dict.fromkeys(row["model"] for row in rows))
    tps = sorted({row["tp"] for row in rows})
    figure, axes = plt.subplots(1, len(tps), figsize=(8, 3.6), sharey=True, layout="constrained")
    for axis, tp in zip(axes, tps, strict=True):
        for size in tables.SHARD_SIZES:
            for order, style in ORDERS.items():
                found = [r for r in rows if (r["tp"], r["shard_size"], r["order"]) == (tp, size, order)]
                label = f"shards of {size}, {order}"
                places = [models.index(r["model"]) for r in found]
                axis.plot(places, [r["bound_ms"] for r in found], style, marker=".", color=SHARDS[size], label=label)
        floors = {r["model"]: r["local_floor_ms"] for r in rows if r["tp"] == tp}
        axis.plot([models.index(m) for m in floors], list(floors.values()), "--", color=SHARDS[1], label="all local")
        for row in tables.measured_copies():
            if row["tp"] == tp and row["model"] in models:
                style = {"marker": "x", "color": SHARDS[row["shard_size"]], "label": "measured", "zorder": 3}
                axis.plot(models.index(row["model"]), row["ms"], linestyle="", **style)
        axis.set_title(f"TP={tp}")
        axis.set_xticks(range(len(models)), [m.rpartition("-")[2] for m in models], fontsize=8)
        axis.set_xlim(-0.5, len(models) - 0.5)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("ms, at least (8 GPUs)")
    handles = {text: h for axis in axes for h, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    return figure


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tables.RESULTS)
    for name, draw in (("push", draw_pushes), ("loop", draw_loops), ("learn", draw_learned), ("shards", draw_shards)):
        draw().savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
