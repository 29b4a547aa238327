"""What a running layout does and refuses, asked of one that is shared (see live.py): real Ray, real vLLM."""

from __future__ import annotations

import math
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
import ray
from live import Shared
from running import require_proof

import rlhf_colocate as rc
from benchmarks import drills
from colocate import grpo, tasks
from colocate.config import FAULTS
from colocate.fleet import Lost, recover, rescue

pytestmark = pytest.mark.e2e


def refused(function, *args) -> str:
    """The message of the error that this must raise; empty if it raises none."""
    try:
        function(*args)
    except (rc.Stop, RuntimeError) as error:
        return str(error)
    return ""


def prompts(layout: Shared) -> list[list[int]]:
    return tasks.token_prompts(layout.model_config, 0, 4, 16)


def samples(layout: Shared) -> list[dict]:
    """What a step learns from. The engine holds the layout's first weights; it is put to sleep."""
    (version,) = layout.on_engines("weights_version")
    found = layout.rollout(prompts(layout), 7, version)
    layout.sleep()
    rewards = [tasks.multiples_of_8(sample["tokens"]) for sample in found]
    shares = grpo.advantages(rewards, layout.config.group_size)
    return [sample | {"advantage": share} for sample, share in zip(found, shares, strict=True)]


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
    layout.change(inject=fault)
    version = next(layout.versions)
    try:
        with rc.blame("push", layout.config):
            layout.connect()
        before = layout.generate(prompts(layout))
        layout.on_workers("record_weights")
        digests = layout.perturb(version)
        with rc.blame("push", layout.config):
            layout.push(version)
    except rc.Stop as stop:
        return str(stop), {}
    return "", layout.verify(digests, prompts(layout), before)[0]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "flip-element"])  # see test_script.py
def test_every_injected_fault_fails_the_right_check(live, fault):
    message, verify = live(prove, fault)
    check = FAULTS[fault][1]
    if message:
        assert message.startswith(f"{check}: ")
    else:
        assert not verify[check]["ok"] and verify[check]["wrong"]
    assert bool(message) == (fault in ("drop-tensor", "drift-replica"))
    if fault == "drop-tensor":
        assert "missing: model." in message
    if fault == "wrong-tp-slice":
        assert verify["transport"]["ok"], "what arrived was right"


def push_both_ways(layout: Shared) -> list[dict]:
    rows = []
    for method in ("recorded", "simple"):
        layout.change(push=method)
        version = next(layout.versions)
        layout.on_workers("record_weights")
        digests = layout.perturb(version)
        push = layout.push(version)
        row = {"method": push["method"], "bytes": push["bytes"], "changed": layout.on_workers("check_weights_changed")}
        row["elements"] = layout.require_elements(digests, method)
        # The other way, of the same weights: the engine must say the same.
        row["before"] = layout.generate(prompts(layout))
        layout.change(push={"recorded": "simple", "simple": "recorded"}[method])
        layout.push(version)
        row["after"] = layout.generate(prompts(layout))
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
    layout.rebuild_trainers(layout.checkpoint)
    return refused(layout.push, next(layout.versions))


def test_the_handles_of_a_trainer_that_was_replaced_are_refused(live):
    assert "HandleError: " in (message := live(push_stale_handles)) and "weights at version" in message


def connect_to_damaged_handles(layout: Shared) -> tuple[str, list[bool]]:
    def damaged() -> dict[str, dict]:
        messages = Shared.handles(layout)
        drills.damage(messages)
        return messages

    layout.on_workers("record_weights")
    layout.handles = damaged
    try:
        return refused(layout.connect), layout.on_workers("check_weights_changed")
    finally:
        del layout.handles


def test_damaged_handles_are_refused_before_anything_is_overwritten(live):
    message, changed = live(connect_to_damaged_handles)
    assert "HandleError: " in message and changed == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def try_everything_in_every_state(layout: Shared, sleep_level: int) -> tuple[dict, list, list]:
    """({(state, action): message} of what is out of order, the engine's words before it all, and after it)."""
    layout.change(sleep_level=sleep_level)
    version = next(layout.versions)
    actions = {
        "connect": (layout.connect,),
        "generate": (layout.generate, prompts(layout)),
        "push": (layout.push, version),
        "sleep": (layout.sleep,),
        "learn": (layout.learn, [], version),
        "wake weights": (layout.wake_up, "weights"),
        "wake kv_cache": (layout.wake_up, "kv_cache"),
    }
    before, found = layout.generate(prompts(layout)), {}
    layout.on_trainers("restore", version)
    for forward in ("sleep", "wake weights", "push", "wake kv_cache"):
        for action, (function, *args) in actions.items():
            if (layout.state, action) not in rc.TRANSITIONS:
                found[layout.state, action] = refused(function, *args)
        function, *args = actions[forward]
        function(*args)
    return found, before, layout.generate(prompts(layout))


@pytest.mark.parametrize("sleep_level", [2, 0])
def test_out_of_order_is_refused_and_changes_nothing(live, sleep_level):
    found, before, after = live(try_everything_in_every_state, sleep_level)
    assert {state for state, _ in found} == {state for state, _ in rc.TRANSITIONS}
    for (state, action), message in found.items():
        assert state in message and action in message
    assert before == after


def push_to_sleeping_weights(layout: Shared) -> str:
    layout.sleep()
    return refused(layout.on_engines, "collective_rpc", "push_weights", next(layout.versions))


def test_a_push_to_a_sleeping_engine_is_refused_by_the_engine(live):
    assert "asleep" in (message := live(push_to_sleeping_weights)) and "RuntimeError: " in message


def tear_a_push(layout: Shared) -> tuple[str, list[str], list, list]:
    """Its last rank fails when the first has its weights. Then a whole push."""
    version = next(layout.versions)
    digests = layout.perturb(version)
    layout.on_workers("disturb_push", "fail")
    torn = refused(layout.on_engines, "collective_rpc", "push_weights", version)
    versions = layout.on_engines("weights_version")
    messages = [refused(layout.generate, prompts(layout))]
    layout.state = "ready"  # only the engine itself is asked
    messages += [refused(layout.rollout, prompts(layout), 7, version)]
    layout.push(version)
    layout.require_elements(digests, "after a torn push")
    return torn, messages, versions, layout.generate(prompts(layout))[0]


def test_an_engine_with_half_a_push_does_not_speak_before_a_whole_one(live):
    torn, messages, versions, outputs = live(tear_a_push)
    assert "rank 1: " in torn and "the drill's error" in torn
    assert versions == [None] and all("no whole push" in message for message in messages)
    assert len(outputs) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The trainers
# ---------------------------------------------------------------------------------------------------------------------


def learn(layout: Shared, steps: int, stale_after: int | None) -> tuple[str, list[dict]]:
    """More steps of the script's loop: (the message of the Stop, if there was one; their rows)."""
    layout.change(steps=steps, logprob_tolerance=0.004)
    layout.stale_after = stale_after
    report: dict = {}
    try:
        rc.learn(layout.config, layout.log, report, layout, done=2)
    except rc.Stop as stop:
        return str(stop), report["steps"]
    return "", report["steps"]


def test_stale_weights_show_in_the_logprobs(live):
    """Bound between what float32 leaves and what 2 % of noise does (0.01 nats)."""
    message, rows = live(learn, 3, 4)  # version 4 is that of the second of these steps
    assert message.startswith("logprobs: step 5: ")
    assert [row["logprob_gap"] < 0.004 for row in rows] == [True, True]


def test_trainers_that_start_again_from_a_checkpoint_go_on_bitwise(live):
    """Two trainers with --kl-coef and --offload-optimizer; after each of these calls they start again."""
    same = ("step", "reward", "loss", "kl", "logprob_gap", "grad_norm", "weights", "best")
    (message, first), (_, again) = live(learn, 1, None), live(learn, 1, None)
    assert not message and first[0]["step"] == 3
    assert [first[0][key] for key in same] == [again[0][key] for key in same]


def save_twice(layout: Shared) -> tuple[list[str], list[str]]:
    """(what is beside the checkpoint, what is in it)."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            layout.save(Path(folder, "checkpoint"))
        return os.listdir(folder), os.listdir(Path(folder, "checkpoint"))


def test_a_checkpoint_replaces_an_older_one_and_leaves_nothing_beside_it(live):
    beside, inside = live(save_twice)
    assert beside == ["checkpoint"]
    assert {"config.json", "model.safetensors", "trainer_state.pt"} <= set(inside)


def learn_nan(layout: Shared) -> tuple[str, bool]:
    found = samples(layout)
    found[0]["advantage"] = math.nan
    message = refused(layout.learn, found, next(layout.versions))
    return message, layout.check_replicas() == layout.digests


def test_a_gradient_that_is_not_finite_is_refused_with_the_weights_unchanged(live):
    message, unchanged = live(learn_nan)
    assert "gradient norm of nan" in message and unchanged


def spoil(layout: Shared, value: float, trainers: slice) -> str:
    layout.ask(layout.trainers[trainers], "spoil", value)
    return refused(layout.check_replicas)


def test_a_weight_that_is_not_finite_is_named_and_not_pushed(live):
    assert re.search(r"NaN or Inf in \S*embed_tokens.weight;.* push refused", live(spoil, math.nan, slice(None)))


def test_a_replica_that_drifted_is_noticed_and_its_weight_named(live):
    message = live(spoil, 0.5, slice(1, None))
    assert message.startswith("replicas: ") and "embed_tokens.weight" in message


def let_one_fail(layout: Shared) -> tuple[str, bool]:
    found = samples(layout)
    found[1]["fails"] = True  # of those of trainer 1
    message = refused(layout.learn, found, next(layout.versions))
    waiting = not ray.wait([layout.trainers[0].__ray_ready__.remote()], timeout=1)[0]
    layout.rebuild_trainers(layout.checkpoint)
    return message, waiting


def test_one_trainer_that_fails_is_heard_while_the_others_wait_for_it(live):
    message, waiting = live(let_one_fail)
    assert message.startswith("training actor 1") and "OSError: the dog ate it" in message
    assert waiting


# ---------------------------------------------------------------------------------------------------------------------
# Losses that end a run. Those that it survives are drills (test_drills.py).
# ---------------------------------------------------------------------------------------------------------------------


def lose_a_trainer_without_restarts(layout: Shared) -> str:
    layout.change(max_restarts=0)
    lost = Lost({("training actor", 1)}, "lost training actor 1")
    return refused(recover, layout, lost, next(layout.versions), [], layout.log)


def test_without_restarts_a_loss_ends_the_run(live):
    message = live(lose_a_trainer_without_restarts)
    assert message.startswith("lost training actor 1") and "--max-restarts 1" in message


def lose_all_trainers(layout: Shared, saved: bool) -> str:
    def look() -> None:
        raise RuntimeError(rescue(layout, set(layout.parts()), Path(), print))

    if not saved:
        layout.saved = None
    return refused(look)


@pytest.mark.parametrize("saved, says", [(True, "the checkpoint checkpoint"), (False, "--checkpoint DIR")])
def test_without_a_trainer_all_hangs_on_the_checkpoint(live, saved, says):
    assert says in live(lose_all_trainers, saved)


def kill_the_raylet(layout: Shared) -> str:
    os.kill(next(member.pid for member in layout.watch.ray if "raylet" in member.role), signal.SIGKILL)
    message = ""
    while not message:  # the actors' processes notice it a little later
        message = refused(layout.on_engines, "generate", prompts(layout), 8)
    return message


def test_a_layout_without_its_raylet_says_so_and_leaves_nothing(live):
    """The last one here: the layout starts again if another test needs it."""
    message = live.last(kill_the_raylet)
    assert re.match(r"lost Ray: Ray's raylet \(pid \d+\) has ended", message), message
