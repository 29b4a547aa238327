"""What a running layout does and refuses, asked of one that is shared (see live.py): real Ray, real vLLM."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import tempfile
from pathlib import Path

import pytest
import ray
from live import Shared
from running import eventually, require_proof

import rlhf_colocate as rc
from benchmarks import drills
from colocate import checks, trainer_state
from colocate.config import Lost, Stop
from colocate.grpo import advantages
from colocate.rewards import TaskError

pytestmark = pytest.mark.e2e


def refused(function, *args, **options) -> str:
    """The message of the error that this must raise; empty if it raises none."""
    try:
        function(*args, **options)
    except (Stop, RuntimeError) as error:
        return str(error)
    return ""


def samples(layout: Shared) -> list[dict]:
    """What a step learns from. The engine is put to sleep."""
    prompts = [p.token_ids for p in layout.task.prompts(3)]
    found = layout.generate(prompts, seed=7, n=layout.config.group_size, temperature=1.0, max_tokens=8)
    layout.sleep(found)()
    rewards = [sum(t % 8 == 0 for t in sample["tokens"]) / 8 for sample in found]
    for sample, advantage in zip(found, advantages(rewards, layout.config.group_size), strict=True):
        sample["advantage"] = advantage
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The start, the proof and the first steps
# ---------------------------------------------------------------------------------------------------------------------


def test_the_start_the_proof_and_two_steps(live):
    report = live.report
    require_proof(report)
    rows = report["placement"]
    assert [(r["engine"], r["tp_rank"]) for r in rows] == [(0, 0), (0, 1)]
    first, second = report["steps"]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 0
    assert not report["losses"]


def test_ray_listens_on_loopback_only(live):
    addresses = live.report["listening"]
    assert addresses and all(a.endswith(("127.0.0.1", "::1")) for a in addresses), addresses


# ---------------------------------------------------------------------------------------------------------------------
# The push
# ---------------------------------------------------------------------------------------------------------------------


def prove(layout: Shared, fault: str) -> tuple[str, dict]:
    """The proof of the push with this fault: (the message of the Stop, if there was one; the checks)."""
    report = layout.change()
    layout.armed = fault
    layout.connected = False
    message = refused(rc.prove_push, layout, layout.task)
    return message, report.data["verify"]


def test_a_push_without_a_fault_passes_the_proof(live):
    message, verify = live(prove, "")
    assert not message
    require_proof({"verify": verify, "pushes": [{"bytes": 1}]})


@pytest.mark.parametrize("fault", drills.FAULTS)
def test_every_negative_control_fails_the_right_check(live, fault):
    message, verify = live(prove, fault)
    check = drills.FAULTS[fault][1]
    if fault == "drop-tensor":
        assert "HandleError: " in message and "missing: model." in message
    elif fault == "drift-replica":
        assert message.startswith("replicas: ") and not verify
    else:
        assert f"{check}: " in message
        assert not verify[check]["ok"] and verify[check]["wrong"]
    if check == "placement":
        assert verify["transport"]["ok"], "what arrived was right"
    if fault == "flip-element":
        assert [list(names.values()) for names in verify["placement"]["wrong"].values()] == [[1]], "one element"
    if fault in ("skip-push", "swap-tensors"):
        assert not verify["behaviour"]["ok"]


def push_both_ways(layout: Shared) -> list[dict]:
    rows = []
    for method, other in (("recorded", "simple"), ("simple", "recorded")):
        layout.change(push=method)
        layout.on_workers("record_weights")
        layout.change_weights(checks.perturb)
        push = layout.push()
        row = {"method": push["method"], "bytes": push["bytes"], "changed": layout.on_workers("check_weights_changed")}
        row["elements"] = layout.elements()
        # The other way, of the same weights: the engine must say the same.
        row["before"] = layout.answers()
        layout.change(push=other)
        layout.push()
        row["after"] = layout.answers()
        rows.append(row)
    return rows


def test_the_simple_and_the_recorded_push_do_the_same(live):
    recorded, simple = live(push_both_ways)
    assert (recorded["method"], simple["method"]) == ("recorded", "simple")
    assert recorded["elements"] == simple["elements"] > 0
    for row in (recorded, simple):
        assert row["bytes"] > 0 and row["changed"] == [True, True]
        assert row["before"] == row["after"]


def push_stale_handles(layout: Shared) -> str:
    layout.restart_trainers()
    layout.restore()
    return refused(layout.push)


def test_the_handles_of_a_trainer_that_was_replaced_are_refused(live):
    message = live(push_stale_handles)
    assert message.startswith("engine 0 (push): HandleError: ") and "version" in message


def connect_to_damaged_handles(layout: Shared) -> tuple[str, list[bool]]:
    layout.on_workers("record_weights")
    layout.armed = "corrupt-handle"
    return refused(layout.connect), layout.on_workers("check_weights_changed")


def test_damaged_handles_are_refused_before_anything_is_overwritten(live):
    message, changed = live(connect_to_damaged_handles)
    assert "HandleError: " in message and changed == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def go_through_a_step(layout: Shared, sleep_level: int) -> tuple[dict, list, list]:
    """({(state, action): what the engine says to what is out of order}, its answers before, and after)."""
    layout.change(sleep_level=sleep_level)
    before = layout.answers()
    layout.restore()  # the same weights, as a new version

    def ask(*call) -> None:
        layout.fleet.ask(layout.engines, *call)

    actions = {
        "generate": lambda: layout.answers(),
        "write": lambda: ask("collective_rpc", "push_weights", layout.version),
        "push": lambda: ask("push", layout.version),
        "wake weights": lambda: ask("wake_up", "weights"),
        "wake KV": lambda: ask("wake_up", "kv_cache"),
    }
    found = {("one version behind", "generate"): refused(actions["generate"])}
    layout.sleep([])()
    for state, wrong, right in (
        ("asleep", ("generate", "write", "wake KV"), "wake weights"),
        ("weights awake", ("generate", "wake KV"), "push"),
    ):
        if sleep_level:
            found |= {(state, action): refused(actions[action]) for action in wrong}
        actions[right]()
    return found, before, layout.answers()


@pytest.mark.parametrize("sleep_level", [2, 0])
def test_what_is_out_of_order_is_refused_and_changes_nothing(live, sleep_level):
    found, before, after = live(go_through_a_step, sleep_level)
    assert len(found) == (6 if sleep_level else 1)
    for (state, action), message in found.items():
        said = {"wake KV": "after the push", "generate": "asleep|at version"}.get(action, "asleep")
        assert message.startswith("engine 0 ") and re.search(said, message), (state, action, message)
    assert before == after


def tear_a_push(layout: Shared) -> tuple[str, str, int]:
    """Its last rank fails when the first has its weights. Then a whole push."""
    layout.change_weights(checks.perturb)
    layout.on_workers(drills.disturb, "fail")
    torn = refused(layout.push)
    message = refused(layout.answers)
    layout.push()
    layout.elements()
    return torn, message, len(layout.answers())


def test_an_engine_with_half_a_push_does_not_speak_before_a_whole_one(live):
    torn, message, answers = live(tear_a_push)
    assert "rank 1: " in torn and "the drill's error" in torn
    assert "the engine is at version None" in message
    assert answers == 4


# ---------------------------------------------------------------------------------------------------------------------
# The trainers
# ---------------------------------------------------------------------------------------------------------------------


def learn(layout: Shared, steps: int, stale_after: int | None) -> tuple[str, list[dict]]:
    """More steps of the script's loop: (the message of the Stop, if there was one; their rows)."""
    report = layout.change(steps=steps, logprob_tolerance=0.004)
    layout.stale_after = stale_after
    message = refused(rc.learn, layout, layout.task, layout.answers())
    return message, report.data["steps"]


def test_stale_weights_show_in_the_logprobs(live):
    """Bound between what float32 leaves and what 2 % of noise does (0.01 nats)."""
    message, rows = live(learn, 3, 4)
    assert message.startswith("logprobs: step 5: ")
    assert [row["logprob_gap"] < 0.004 for row in rows] == [True, True]


def test_trainers_that_start_again_from_a_checkpoint_go_on_bitwise(live):
    """Two trainers with --kl-coef and --offload-optimizer; after each of these calls they start again."""
    same = ("step", "reward", "loss", "kl", "logprob_gap", "grad_norm", "weights", "best")
    message, first = live(learn, 1, None)
    again = live(learn, 1, None)[1]
    assert not message and first[0]["step"] == 3
    assert [first[0][key] for key in same] == [again[0][key] for key in same]


def fail_in_the_second_step(layout: Shared) -> tuple[str, int, int]:
    """The reward does. (The message, steps before that, steps in the checkpoint that is left.)"""
    task = copy.copy(layout.task)
    scored = []

    def score(prompts: list, samples: list[dict]) -> None:
        scored.append(samples)
        if len(scored) == 2:
            raise TaskError("reward: mine.py:f raised KeyError")
        layout.task.score(prompts, samples)

    task.score = score
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint")
        report = layout.change(steps=3, checkpoint=str(path))
        message = refused(rc.learn, layout, task, layout.answers())
        return message, report.data["steps"][-1]["step"], trainer_state.read_numbers(path)["steps"]


def test_a_reward_that_fails_leaves_the_last_whole_step(live):
    message, done, saved = live(fail_in_the_second_step)
    assert message == "reward: mine.py:f raised KeyError" and done == saved == 3


def save_twice(layout: Shared) -> tuple[list[str], list[str]]:
    """(what is beside the checkpoint, what is in it)."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            layout.save(Path(folder, "checkpoint"))
        return os.listdir(folder), os.listdir(Path(folder, "checkpoint"))


def test_a_checkpoint_replaces_an_older_one_and_leaves_nothing_beside_it(live):
    beside, inside = live(save_twice)
    assert beside == ["checkpoint"]
    assert {"config.json", "model.safetensors", "trainer_state"} <= set(inside)


def learn_nan(layout: Shared) -> tuple[str, bool]:
    found = samples(layout)
    found[0]["advantage"] = math.nan
    return refused(layout.train, found), layout.as_saved()


def test_a_gradient_that_is_not_finite_is_refused_with_the_weights_unchanged(live):
    message, unchanged = live(learn_nan)
    assert "gradient norm of nan" in message and unchanged


def spoil(layout: Shared, value: float, trainers: list[str]) -> str:
    layout.fleet.ask(trainers, drills.spoil, value)
    return refused(layout.restore)


def test_a_weight_that_is_not_finite_is_named_and_not_pushed(live):
    message = live(spoil, math.nan, ["trainer 0", "trainer 1"])
    assert re.search(r"NaN or Inf in \S*embed_tokens.weight: push refused", message)


def test_a_replica_that_drifted_is_noticed_and_its_weight_named(live):
    message = live(spoil, 0.5, ["trainer 1"])
    assert message.startswith("replicas: ") and "embed_tokens.weight" in message


def fail_in_step(trainer) -> None:
    def step(samples: list[dict], total_tokens: int) -> None:
        raise OSError("the dog ate it")

    trainer.learner.step = step


def let_one_fail(layout: Shared) -> tuple[str, bool]:
    found = samples(layout)
    layout.fleet.ask(["trainer 1"], fail_in_step)
    message = refused(layout.train, found)
    waiting = not ray.wait([layout.fleet.actors["trainer 0"].__ray_ready__.remote()], timeout=1)[0]
    layout.restart_trainers()
    return message, waiting


def test_one_trainer_that_fails_is_heard_while_the_others_wait_for_it(live):
    message, waiting = live(let_one_fail)
    assert message.startswith("trainer 1 (learn): ") and "OSError: the dog ate it" in message
    assert waiting


# ---------------------------------------------------------------------------------------------------------------------
# Losses. How a run survives them are drills (test_drills.py).
# ---------------------------------------------------------------------------------------------------------------------


def mapped(layout: Shared) -> int:
    """How many blocks of trainers' weights the engine's workers have mapped."""
    blocks = set()
    for member in layout.fleet.watch.of(layout.engines):
        maps = Path(f"/proc/{member.pid}/maps").read_text()
        blocks |= set(re.findall(r"(\d+) +/memfd:rlhf-weights", maps))
    return len(blocks)


def lose_a_trainer(layout: Shared) -> list[int]:
    """How many blocks are mapped before the loss, when new trainers start, when they have, and after the next push."""
    report = layout.change()
    report.loop(2, 3)
    lost = Lost({"trainer 1"}, "lost trainer 1", during="rollout")
    report.lost(lost)
    found = [mapped(layout)]

    def start(names: list[str]) -> None:
        found.append(mapped(layout))
        Shared.start(layout, names)

    layout.start = start
    try:
        layout.kill("trainer 1")
        layout.recover(lost)
    finally:
        del layout.start
    found.append(mapped(layout))
    layout.push()
    return [*found, mapped(layout)]


def test_the_memory_of_lost_trainers_is_free_before_new_ones_load(live):
    assert live(lose_a_trainer) == [2, 0, 0, 2]


def lose_the_engine(layout: Shared) -> tuple[str, set[int], set[int]]:
    """(what is wrong with spare processes, the spare ones, those that the next engine has)."""
    layout.change().loop(2, 3)
    idle = layout.fleet.watch.idle
    before = idle()
    layout.cluster.config = dataclasses.replace(layout.config, spare_processes=3)
    try:
        trouble = layout.cluster.keep_spares()
    finally:
        layout.cluster.config = layout.first_config
    eventually(lambda: trouble or len(idle() - before) == 3)
    spare = idle()
    lost = Lost({"engine 0"}, "lost engine 0", during="rollout")
    layout.report.lost(lost)
    layout.kill("engine 0")
    layout.recover(lost)
    layout.push()
    return trouble, spare, {member.pid for member in layout.fleet.watch.of(["engine 0"])}


def test_a_lost_engine_is_replaced_by_spare_processes(live):
    trouble, spare, new = live(lose_the_engine)
    assert not trouble
    assert len(new) == 3 and new <= spare


def lose_a_worker_twice(layout: Shared) -> tuple[str, list[str], int]:
    """The second as soon as it starts: (the message that ends the loop, those of the losses, steps that were done)."""
    before = layout.answers()
    report = layout.change(steps=1, max_restarts=2)
    layout.armed = "kill-worker-twice"
    layout.kill(layout.last_rank)
    message = refused(rc.learn, layout, layout.task, before)
    return message, [loss["message"] for loss in report.data["losses"]], len(report.data["steps"])


def test_what_is_lost_while_it_is_replaced_is_replaced_again(live):
    message, losses, steps = live(lose_a_worker_twice)
    assert not message and steps == 1
    assert [bool(re.search(r"lost engine 0: engine 0", loss)) for loss in losses] == [True, True], losses
    assert losses[1].startswith("start: ")


def lose_all_trainers(layout: Shared, saved: bool) -> str:
    said = []
    layout.report = lambda tag, text: said.append(text)
    if not saved:
        layout.checkpoint = None
    return refused(layout.save_surviving_state, set()) or said[-1]


@pytest.mark.parametrize(
    "saved, says", [(True, "start again from the checkpoint checkpoint$"), (False, "no checkpoint.* --checkpoint DIR")]
)
def test_without_a_trainer_all_hangs_on_the_checkpoint(live, saved, says):
    assert re.search(says, live(lose_all_trainers, saved))


def kill_the_raylet(layout: Shared) -> str:
    layout.kill("Ray's raylet")
    message = ""
    while not message:  # the actors' processes notice it a little later
        message = refused(layout.answers)
    return message


def test_a_layout_without_its_raylet_says_so_and_leaves_nothing(live):
    """The last one here: the layout starts again if another test needs it."""
    message = live.last(kill_the_raylet)
    assert re.match(r"lost Ray: Ray's raylet \(pid \d+\) has ended", message), message
