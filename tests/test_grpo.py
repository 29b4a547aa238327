"""What the trainers learn: advantages, the loss against its formula, replicas against one process, save and load."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import deadline

torch = pytest.importorskip("torch")

from colocate import grpo  # noqa: E402
from colocate.learner import Learner, default_learning_rate, join_group  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def tiny(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16).eval()


def samples(n: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(n):
        prompt, tokens = (
            torch.randint(0, 97, (length,), generator=generator).tolist() for length in (3 + i % 3, 2 + i)
        )
        found.append({"prompt": prompt, "tokens": tokens, "advantage": (-1) ** i * (1 + i / 4)})
    for s in found:  # as if sampled from the model itself
        batch = grpo.collate([s | {"logprobs": [0.0] * len(s["tokens"])}], torch.device("cpu"))
        with torch.no_grad():
            s["logprobs"] = grpo.token_logprobs(tiny(), batch)[0, len(s["prompt"]) - 1 :].tolist()
    return found


def learner(**options):
    defaults = {"learning_rate": 1e-2, "clip_range": 0.2, "kl_coef": 0.0, "micro_batch_size": 3, "offload": False}
    return Learner(tiny(), **defaults | options)


def total(found: list[dict]) -> int:
    return sum(len(s["tokens"]) for s in found)


def test_advantages_are_normalised_within_each_group():
    found = grpo.advantages([0, 1, 2, 3, 5, 5, 5, 5], 4)
    assert sum(found[:4]) == pytest.approx(0) and found[3] == pytest.approx(1.5 / math.sqrt(5 / 3), rel=1e-3)
    assert found[4:] == [0, 0, 0, 0], "equal rewards teach nothing"


@pytest.mark.parametrize(
    "ratio, advantage, objective", [(1.5, 1, 1.2), (0.5, -1, -0.8), (0.5, 1, 0.5), (1.5, -1, -1.5)]
)
def test_the_ratio_is_clipped_where_that_is_the_worse(ratio, advantage, objective):
    batch = {"mask_BT": torch.ones(1, 1), "sampler_BT": torch.zeros(1, 1), "advantage_B1": torch.tensor([[advantage]])}
    loss, sums = grpo.grpo_loss(torch.tensor([[math.log(ratio)]]), batch, 1, 0.2)
    assert float(loss) == pytest.approx(-objective)
    assert float(sums["logprob_gap"]) == pytest.approx(abs(math.log(ratio)))


def test_padding_and_prompts_take_no_part():
    found = samples()
    batch = grpo.collate(found, torch.device("cpu"))
    assert int(batch["mask_BT"].sum()) == total(found)
    logprobs_BT = grpo.token_logprobs(tiny(), batch)
    _, sums = grpo.grpo_loss(logprobs_BT, batch, total(found), 0.2)
    assert float(sums["ratio"]) == pytest.approx(total(found), rel=0.02), "fresh samples have ratio 1"
    poisoned = logprobs_BT.masked_fill(batch["mask_BT"] == 0, 3.0)
    assert grpo.grpo_loss(poisoned, batch, 9, 0.2)[0] == grpo.grpo_loss(logprobs_BT, batch, 9, 0.2)[0]


def test_a_step_changes_the_weights_in_place_and_makes_better_completions_likelier():
    found, it = samples(), learner()
    addresses = [p.data_ptr() for p in it.model.parameters()]
    first = it.step(found, total(found))
    for _ in range(3):
        it.step(found, total(found))
    assert [p.data_ptr() for p in it.model.parameters()] == addresses
    assert first["logprob_gap"] < 0.02 and first["ratio"] == pytest.approx(1, abs=0.02)
    batch = grpo.collate(found, torch.device("cpu"))
    moved_BT = (grpo.token_logprobs(it.model, batch) - batch["sampler_BT"]) * batch["mask_BT"]
    assert float((moved_BT.detach() * batch["advantage_B1"]).sum()) > 0


def test_kl_to_the_starting_weights():
    found, it = samples(), learner(kl_coef=0.1)
    assert it.step(found, total(found))["kl"] == pytest.approx(0, abs=1e-6)
    assert it.step(found, total(found))["kl"] > 0


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    found, it = samples(), learner()
    before = [p.clone() for p in it.model.parameters()]
    found[0]["advantage"] = math.nan
    with pytest.raises(ValueError, match="gradient norm of nan"):
        it.step(found, total(found))
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_save_and_load_go_on_bitwise(tmp_path, offload):
    found, it = samples(), learner(offload=offload)
    it.step(found, total(found))
    it.save(tmp_path)
    other = learner(offload=offload)
    other.load(tmp_path)
    assert other.steps == 1
    assert it.step(found, total(found)) == other.step(found, total(found))
    for a, b in zip(it.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


REPLICA = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from colocate.learner import join_group
from test_grpo import learner, samples, total
rank, addresses = int(sys.argv[1]), sys.argv[2].split(",")
torch.set_num_threads(1)
join_group(rank, addresses, 120, torch.device("cpu"))
found, it = samples(), learner()
numbers = it.step(found[rank :: len(addresses)], total(found))
torch.save([p for p in it.model.parameters()], f"{{sys.argv[3]}}/{{rank}}.pt")
print(json.dumps(numbers))
"""


def test_three_replicas_do_what_one_process_does_with_the_whole_batch(tmp_path):
    script = REPLICA.format(root=str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    args = [",".join([address] * 3), str(tmp_path)]
    commands = [[sys.executable, "-c", script, str(rank), *args] for rank in range(3)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    outputs = [p.communicate(timeout=deadline(120)) for p in running]
    assert not any(p.returncode for p in running), outputs
    numbers = [json.loads(out) for out, _ in outputs]
    found, it = samples(), learner()
    alone = it.step(found, total(found))
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[0] == pytest.approx(alone, rel=1e-3, abs=1e-4)
    replicas = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for first, *others, one in zip(*replicas, it.model.parameters(), strict=True):
        assert all(torch.equal(first, other) for other in others), "replicas are bitwise identical"
        # The first step of Adam moves each weight by the learning rate, whatever the gradient's size.
        assert float((first - one).detach().abs().max()) <= 1e-2 * 2.1
        assert float((first != one).float().mean()) < 0.05


def test_a_checkpoint_knows_whether_it_has_starting_weights(tmp_path):
    found, it = samples(), learner(kl_coef=0.1)
    it.step(found, total(found))
    it.save(tmp_path)
    with pytest.raises(ValueError, match="Give the same --kl-coef again"):
        learner().load(tmp_path)
    other = learner(kl_coef=0.1)
    other.load(tmp_path)
    assert it.step(found, total(found)) == other.step(found, total(found))


def test_one_trainer_needs_no_process_group():
    join_group(0, ["nowhere:1"], 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_random_weights_learn_faster_unless_a_rate_is_given():
    model = tiny()
    assert default_learning_rate(model, random_weights=False) == 1e-5
    assert default_learning_rate(model, random_weights=True) == 1e-2, "a hidden size of 32"
    options = {"clip_range": 0.2, "kl_coef": 0.0, "micro_batch_size": 3, "offload": False}
    rates = [Learner(model, True, learning_rate=rate, **options).optimizer.defaults["lr"] for rate in (None, 3e-4)]
    assert rates == [1e-2, 3e-4]


def test_learning_rate_zero_moves_nothing():
    found, it = samples(), learner(learning_rate=0.0)
    before = [p.clone() for p in it.model.parameters()]
    it.step(found, total(found))
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))
