"""What a push must show: functions that run in a trainer, and the driver's judgement of what all actors found.

A check is {"ok", "checked": how many were compared, "wrong": which failed, ...}: none is ok that compared nothing.
What a worker compares is in colocate/verify.py.
"""

from __future__ import annotations

import collections
import hashlib
import json

from colocate.config import Stop
from colocate.report import summary

COMPARED = ("transport", "placement", "beside")  # kinds of what `verify.compare` finds

# ---------------------------------------------------------------------------------------------------------------------
# In a trainer
# ---------------------------------------------------------------------------------------------------------------------


def weight_digests(trainer) -> dict[str, str]:
    """{weight, or a piece of it that this trainer holds (see `Piece.named`): 64-bit digest of its bits}.

    Raises ValueError if one holds NaN or Inf.
    """
    import torch

    import rlhf_utils

    held = {name: rlhf_utils.Piece.of(weight) for name, weight in trainer.weights.items()}
    digests = {}
    bad = []
    for number in trainer.held.rounds():
        weights = {piece.named(name): piece.tensor for name, piece in held.items() if piece.round == number}
        # A sum is finite only if all it adds up is, and takes no memory beside the weights.
        finite = torch.stack([t.sum(dtype=torch.float32).isfinite() for t in weights.values()]).tolist()
        bad += [name for name, ok in zip(weights, finite, strict=True) if not ok]
        digests |= {name: rlhf_utils.digest(t) for name, t in weights.items()}
    if bad:  # not before: all trainers of a replica go through the rounds together
        raise ValueError(f"NaN or Inf in {summary(bad)}: push refused")
    return digests


def fingerprint(digests: dict[str, str]) -> str:
    """All weights' digests as one, 16 hex digits."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def perturb(trainer, *, version: int, noise: float = 0.02) -> None:
    """Change every weight by seeded noise, another for each tensor, shard and version.

    noise: by how much of a weight's root mean square.

    For the proof of the push, which an optimizer step does not suit: it leaves some weights as they are.
    """
    import torch

    shard = trainer.held.position << 56
    generator = torch.Generator(trainer.device).manual_seed(trainer.seed * 1_000_003 + version + shard)
    with torch.no_grad(), trainer.changing_weights(version):
        for p in trainer.held.memory.values():
            scale = noise * p.float().square().mean().sqrt().clamp_min(0.02)
            change = torch.empty(p.shape, dtype=torch.float32, device=trainer.device).normal_(generator=generator)
            p.add_((change * scale).to(p.dtype))


def token_logprobs(trainer, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probability, in nats, of each token but the first given those before it, by the trainer's own model.

    Of all trainers at once: those that hold shards gather the layers for it. They compute with what engines read, and
    with the model's own code, which `compile_layers` may have replaced.
    """
    import torch

    result = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.held.computing_as_engines():
        for token_ids in sequences:
            ids_T = torch.tensor(token_ids, device=trainer.device)
            logprobs_TV = trainer.model(ids_T[None]).logits[0].float().log_softmax(-1)
            result.append(logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# In the driver
# ---------------------------------------------------------------------------------------------------------------------


def require_equal(digests: list[dict[str, str]], size: int = 1) -> dict[str, str]:
    """The digests of one replica. Raises Stop unless the weights are bitwise the same in all of them.

    digests: `weight_digests` of all trainers, of which `size` make up a replica. Pushed, different ones would tear an
    engine apart.
    """
    replicas = [collections.ChainMap(*digests[i : i + size]) for i in range(0, len(digests), size)]
    first = replicas[0]
    wrong = {n for other in replicas[1:] for n in other.keys() | first.keys() if other.get(n) != first.get(n)}
    if wrong:
        raise Stop(f"replicas: the trainers' weights differ, push refused: {summary(sorted(wrong))}")
    return dict(first)


def require_same_steps(states: list[dict]) -> int:
    """How many steps all trainers of a replica have done. Raises Stop if they are in the middle of one."""
    steps = sorted({state["steps"] for state in states})
    if len(steps) > 1:
        raise Stop(f"shards are of different steps, {steps}: some trainers were lost in the middle of one")
    if any(state["interrupted"] for state in states):
        raise Stop(f"step {steps[0] + 1} was interrupted between its iterations")
    return steps[0]


def combine(results: list[dict], kind: str, strict: bool = False) -> dict:
    """All workers' `verify.compare`, of one of COMPARED. There may be nothing beside the parameters.

    For elements whose place the layout does not know, vLLM's loaders speak: that they write each exactly once was
    required before the push. strict: what was not compared is wrong.
    """
    parts = [r[kind] for r in results]
    wrong = {}
    for r in results:
        found = r[kind]["wrong"]
        if strict and kind == "placement":
            unknown = r[kind]["processed"] | r[kind]["unknown"]
            found = found | {name: f"{count} elements were not compared (--strict)" for name, count in unknown.items()}
        if found:
            wrong[f"{r['gpu']} rank {r['tp_rank']}"] = found
    compared = all(p["checked"] > 0 or p.get("unknown") or kind == "beside" for p in parts)
    check = {"ok": not wrong and compared, "checked": sum(p["checked"] for p in parts)}
    for extra in ("padding", "processed", "unknown"):
        if extra in parts[0]:
            check[extra] = {f"{r['gpu']} {n}": c for r in results for n, c in r[kind][extra].items()}
    return check | {"wrong": wrong}


def changed(found: list[bool]) -> dict:
    """All workers' `check_weights_changed`."""
    wrong = [f"worker {i}" for i, c in enumerate(found) if not c]
    return {"ok": bool(found) and all(found), "checked": len(found), "wrong": wrong}


def behaviour(before: list[dict], after: list[dict], trainer: list[list[float]], tolerance: float) -> dict:
    """Compare log-probabilities: the engines' with the trainer's (must agree), and with their own before (must not).

    before, after: samples of the same prompts; trainer: its log-probabilities of the tokens in `after`, but the first.
    Gaps are absolute differences in nats, over prompt and new tokens. What bf16 leaves was measured: 0.002 to 0.012 on
    average with random weights, 0.037 with a pretrained SmolLM2-135M, and 0.18 for the worst token; wrong weights leave
    0.15 and more on average.
    """
    gaps = []
    moved = []
    for old, new, reference in zip(before, after, trainer, strict=True):
        gaps += [abs(a - b) for a, b in zip(new["prompt_logprobs"] + new["logprobs"], reference, strict=True)]
        moved += [abs(a - b) for a, b in zip(new["prompt_logprobs"], old["prompt_logprobs"], strict=True)]
    worst = max(gaps)
    gap = sum(gaps) / len(gaps)
    moved_by = sum(moved) / max(len(moved), 1)
    moved_enough = moved_by > 2 * gap or not moved  # prompts of a single token say nothing
    ok = gap <= tolerance and worst <= 10 * tolerance and moved_enough
    wrong = [] if ok else [f"mean gap {gap:.4f}, largest {worst:.4f}, moved by {moved_by:.4f} nats"]
    numbers = {"mean_gap_nats": gap, "max_gap_nats": worst, "moved_by_nats": moved_by, "tolerance_nats": tolerance}
    return {"ok": ok, "checked": len(gaps), **numbers, "wrong": wrong}
