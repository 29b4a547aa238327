"""What a push into quantized engines takes on one GPU, and whether its bits are those of vLLM's own loading.

    python benchmarks/bench_fp8.py --shape Qwen2.5-0.5B --output out.json        2 minutes on an H100

A trainer and an engine for each quantization, no Ray; they start together and are measured one after the other. Each
engine loads a checkpoint of random weights by itself. Then its weights are changed by pushes, and the push of the
checkpoint's weights must bring back each bit of the first state, scales included; so must vLLM's layerwise reload of
other weights and a push of the same. Every element is compared with plain torch, too (colocate/verify.py).

Times are milliseconds. `graph`: the recorded push on the GPU alone. "same": the largest element of each weight is what
it was at the last push; "other": it is another. `floor`: what the push must read (16
bits) and write, at the rate of a plain copy on this GPU. `reload`: the same through vLLM's layerwise reload.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import SHAPES, write_shape  # noqa: E402

from colocate.config import QUANTIZATIONS  # noqa: E402
from colocate.preflight import find_gpus, installed  # noqa: E402
from colocate.report import command_line  # noqa: E402

PROMPTS, LENGTH = 16, 64


# ---- On the worker --------------------------------------------------------------------------------------------------


def digests(worker) -> dict[str, str]:
    import rlhf_utils

    return {n: rlhf_utils.digest(p) for n, p in worker.get_model().named_parameters()}


def graph_ms(worker, repeats: int) -> dict:
    """{"same", "other"}: replays of the recorded push, medians; "rate": of a plain copy, bytes in and out a ms."""
    import torch

    (copies,) = worker._plan.rounds.values()
    size = max(2**28, copies.nbytes // 2)
    source = torch.empty(size, dtype=torch.uint8, device=worker.device)
    target = torch.empty_like(source)

    def forget() -> None:
        for run in copies.launches:
            run.state.zero_()

    def median(run, before=lambda: None) -> float:
        times = []
        for _ in range(repeats):
            before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    replay = copies.graph.replay
    rate = 2 * size / median(lambda: target.copy_(source))
    return {"same": median(replay), "other": median(replay, forget), "rate": rate}


# ---- A trainer and its engine ---------------------------------------------------------------------------------------


def measure(folder: str, quantization: str, lock: str, repeats: int) -> dict:
    os.environ |= {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    import torch
    import transformers
    import vllm

    import rlhf_utils as u

    extension = "rlhf_utils.ColocateWorkerExtension"
    if quantization != "none":
        extension = "colocate.fp8.QuantizingExtension"
    llm = vllm.LLM(
        folder,
        skip_tokenizer_init=True,
        quantization=QUANTIZATIONS[quantization],
        dtype="bfloat16",
        max_model_len=2 * LENGTH,
        gpu_memory_utilization=0.15,
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,
        enable_prefix_caching=False,
        worker_extension_cls=extension,
        seed=0,
    )
    device = torch.device("cuda:0")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    original = [p.detach().clone() for p in model.parameters()]
    number = 0
    version = torch.zeros((), dtype=torch.int64, device=device)
    named = [*u.checkpoint_tensors(model), (u.VERSION, version)]

    def call(method: str, *args):
        (result,) = u.call_workers(llm, method, *args)
        return result

    def handles() -> dict:
        return {u.device_uuid(device): u.export_handles(named)}

    def change(noise: float | None) -> None:
        """Add noise, a share of each weight's root mean square; None: take the checkpoint's weights."""
        nonlocal number
        number += 1
        version.fill_(-1)
        with torch.no_grad():
            for p, first in zip(model.parameters(), original, strict=True):
                if noise is None:
                    p.copy_(first)
                elif noise:
                    p.add_((noise * p.float().square().mean().sqrt().clamp_min(0.02) * torch.randn_like(p)).to(p.dtype))
        version.fill_(number)
        torch.cuda.synchronize()

    def push() -> float:
        start = time.perf_counter()
        call("push_weights", number)
        return 1e3 * (time.perf_counter() - start)

    found: dict = {"quantization": quantization}
    call("colocate.verify:first_look")
    own = call("bench_fp8:digests")
    connect = call("connect_weights", handles())
    found |= {k: connect[k] for k in ("copies", "bytes", "record_ms")} | {"loaders": len(connect["loaders"])}
    change(0.1)
    push()
    pushed = call("bench_fp8:digests")
    found["unchanged"] = [n for n, d in pushed.items() if d == own[n] and not n.endswith("scale")]
    sent = {name: u.digest(weight) for name, weight in named if name != u.VERSION}
    placement = call("colocate.verify:compare", handles(), sent)["placement"]
    found["compared"] = {k: placement[k] for k in ("checked", "wrong", "processed", "unknown")}
    simple = call("update_weights_from_ipc_handles", handles())
    reloaded = call("bench_fp8:digests")
    found["differs_from_reload"] = [n for n, d in reloaded.items() if d != pushed[n]]
    found["reload_ms"] = simple["load_ms"]
    change(None)
    push()
    loaded = call("bench_fp8:digests")
    found["differs_from_own_loading"] = [n for n, d in loaded.items() if d != own[n]]
    found["gap"] = gap(llm, model)
    with open(lock, "w") as file:  # one after the other
        fcntl.flock(file, fcntl.LOCK_EX)
        found["reload_ms"] = min(
            found["reload_ms"], *(call("update_weights_from_ipc_handles", handles())["load_ms"] for _ in range(2))
        )
        push()
        for name, noise in (("same", 0.0), ("other", 0.1)):
            times = []
            for _ in range(repeats):
                change(noise)
                times.append(push())
            found[f"push_ms_{name}"] = statistics.median(times)
        if not found["loaders"]:
            graph = call("bench_fp8:graph_ms", repeats)
            found |= {"graph_ms_other": graph["other"], "graph_ms_same": graph["same"]}
            read = sum(t.nbytes for _, t in named)
            found["floor_ms"] = (read + found["bytes"]) / graph["rate"]
    llm.llm_engine.engine_core.shutdown()
    return found


def gap(llm, model) -> dict:
    """Mean and largest difference of the engine's and the trainer's log-probabilities, nats."""
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (PROMPTS, LENGTH), generator=generator)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    engine = [
        [at[int(t)].logprob for at, t in zip(o.prompt_logprobs[1:], row[1:], strict=True)]
        for o, row in zip(outputs, ids, strict=True)
    ]
    with torch.no_grad():
        logprobs = model(ids.to(model.device)).logits.float().log_softmax(-1)
    mine = logprobs[:, :-1].gather(2, ids[:, 1:, None].to(model.device))[..., 0].cpu()
    differences = (torch.tensor(engine) - mine).abs()
    return {"mean": differences.mean().item(), "largest": differences.max().item()}


# ---- All of them ----------------------------------------------------------------------------------------------------


def describe(row: dict) -> list[str]:
    name = row["quantization"]
    bits = {"differs_from_own_loading": "vLLM's own loading", "differs_from_reload": "vLLM's layerwise reload"}
    lines = [
        f"{name}: bits as {what}: {'YES' if not row[key] else f'NO: {row[key][:3]}'}" for key, what in bits.items()
    ]
    compared = row["compared"]
    left = sum(sum(compared[kind].values()) for kind in ("processed", "unknown"))
    lines.append(
        f"{name}: {compared['checked']} elements as plain torch makes them, wrong {compared['wrong']}, {left} not "
        f"compared; unchanged by a push: {row['unchanged'] or 'none'}"
    )
    text = f"push {row['push_ms_same']:.2f} (same) {row['push_ms_other']:.2f} (other), reload {row['reload_ms']:.1f} ms"
    if "floor_ms" in row:
        same, other, floor = row["graph_ms_same"], row["graph_ms_other"], row["floor_ms"]
        text += f"; graph {same:.3f} (same) {other:.3f} (other), floor {floor:.3f} ms"
        text += f": {same / floor:.2f} x, {other / floor:.2f} x"
    lines.append(f"{name}: {text}; {row['copies']} copies, {row['loaders']} weights by loaders")
    lines.append(f"{name}: gap {row['gap']['mean']:.4f} nats, largest {row['gap']['largest']:.4f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="Qwen2.5-0.5B")
    every = tuple(QUANTIZATIONS)
    parser.add_argument("--quantizations", nargs="+", choices=every, default=every)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # folder, quantization, lock
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(*args.one, args.repeats)), flush=True)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        folder = write_shape(args.shape, Path(scratch) / args.shape)
        make = f"""
import torch, transformers
torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained({str(folder)!r})
with torch.device("cuda"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained({str(folder)!r})
"""
        subprocess.run([sys.executable, "-c", make], check=True, timeout=300)
        sides = []
        for quantization in args.quantizations:
            log = Path(scratch) / f"{quantization}.log"
            command = [sys.executable, __file__, "--repeats", str(args.repeats), "--one", str(folder), quantization]
            command.append(str(Path(scratch) / "lock"))
            side = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
            running.callback(side.kill)
            sides.append((quantization, log, side))
        for quantization, log, side in sides:
            side.wait(timeout=900)
            text = log.read_text()
            found = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
            if not found:
                print(f"{quantization}: FAILED: {text[-3000:]}")
            for row in found:
                rows.append(row)
                print("\n".join(describe(row)), flush=True)
    by_name = {row["quantization"]: row for row in rows}
    if "none" in by_name:
        for name in by_name.keys() - {"none"}:
            for case in ("same", "other"):
                ratio = by_name[name][f"push_ms_{case}"] / by_name["none"][f"push_ms_{case}"]
                print(f"{name}: a push ({case}) takes {ratio:.2f} x the 16-bit push's")
    if args.output:
        gpus = find_gpus()
        report = {"shape": args.shape, "hardware": {"gpus": gpus[:1], "cpu_cores": os.cpu_count()}}
        report |= {"versions": installed("ray", "torch", "transformers", "vllm")}
        report |= {"date": f"{datetime.date.today()}", "command": command_line("benchmarks/bench_fp8.py", sys.argv[1:])}
        args.output.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    wrong = any(r["differs_from_own_loading"] or r["differs_from_reload"] or r["compared"]["wrong"] for r in rows)
    return 1 if wrong or len(rows) < len(args.quantizations) else 0


if __name__ == "__main__":
    sys.exit(main())
