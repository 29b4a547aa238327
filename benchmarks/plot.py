"""Draw the README's figure of push times from the reports in results/: `python benchmarks/plot.py [OUT.svg]`.

Needs matplotlib. One group of bars per shape, on a logarithmic scale; the dashed line is the floor: a no-op through
vLLM's collective_rpc plus a device copy of the largest shard.
"""

import sys
from pathlib import Path

import matplotlib
import tables

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "rlhf-colocate", "font.size": 9}  # the same file for the same figures

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    "vllm": "#9aa5b1",
    "vllm-packed": "#c3cad2",
    "simple": "#6b9bd1",
    "bucket": "#a8c8ea",
    "recorded": "#e07b39",
}


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tables.RESULTS / "push.svg")
    shapes = tables.bench_shapes()
    figure, axis = plt.subplots(figsize=(8, 0.4 + 1.25 * len(shapes)), layout="constrained")
    top, labels = 0.0, []
    for (hardware, shape), rows in shapes.items():
        recorded = rows["recorded"]
        floor = recorded["noop_rpc_ms"] + recorded["device_copy_ms"]
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
    axis.set_xlabel("one push, wall time in ms (median of 30), logarithmic; dashed: no-op RPC + device copy")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
