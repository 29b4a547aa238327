"""What the driver makes of the answers of trainers and workers. No vLLM, no GPU."""

from __future__ import annotations

import pytest

from colocate import verify


def test_replicas():
    same = {"a": "1", "b": "2"}
    assert verify.replicas([same, same]) == {"ok": True, "checked": 4, "wrong": []}
    assert verify.replicas([same, {"a": "1", "b": "3"}])["wrong"] == ["b"]
    assert verify.replicas([same, {"a": "1"}])["wrong"] == ["b"]


def test_changed():
    assert verify.changed([True, True])["ok"]
    assert not verify.changed([False, False])["ok"], "a list of False is truthy, and must not pass"
    assert not verify.changed([])["ok"]


def worker(wrong: list[str] | None = None, checked: int = 5, **placement) -> dict:
    places = {"checked": checked, "wrong": {}, "padding": {}, "processed": {}, "unknown": {}} | placement
    transport = {"checked": checked, "wrong": wrong or []}
    return {"gpu": "GPU-1", "tp_rank": 0, "transport": transport, "placement": places}


def test_transport():
    assert verify.elements([worker(), worker()])["transport"]["ok"]
    assert not verify.elements([worker(), worker(["w"])])["transport"]["ok"]
    assert not verify.elements([worker(), worker(checked=0)])["transport"]["ok"], "nothing checked"


def test_placement():
    assert verify.elements([worker(), worker()])["placement"]["ok"]
    bad = worker()
    bad["placement"]["wrong"] = {"q": 3}
    found = verify.elements([worker(), bad])["placement"]
    assert not found["ok"] and found["wrong"] == {"GPU-1 rank 0": {"q": 3}}


def test_strict_makes_an_error_of_what_was_not_compared():
    unknown = worker(processed={"w13": 5}, unknown={"A": 7})
    unknown["placement"]["checked"] = 0
    assert verify.elements([unknown])["placement"]["ok"], "the recording of vLLM's loaders speaks for A"
    strict = verify.elements([unknown], strict=True)["placement"]
    assert not strict["ok"]
    assert set(strict["wrong"]["GPU-1 rank 0"]) == {"A", "w13"}
    assert not verify.elements([worker(checked=0)])["placement"]["ok"]


@pytest.mark.parametrize(
    ("old", "new", "trainers", "ok"),
    [
        (-5.0, -2.00, -2.01, True),
        (-5.0, -2.00, -2.90, False),  # the engine has other weights than the trainer
        (-2.0, -2.00, -2.01, False),  # nothing has moved
    ],
)
def test_behaviour(old, new, trainers, ok):
    before = [[{"prompt": [1, 2, 3], "logprobs": [old] * 4}]]
    after = [[{"prompt": [1, 2, 3], "logprobs": [new] * 4}]]
    assert verify.behaviour(before, after, [[[trainers] * 4]], tolerance=0.06)["ok"] is ok


@pytest.mark.parametrize("bad", [-3.0, float("nan")])
def test_behaviour_fails_for_a_single_bad_token(bad):
    before = [[{"prompt": [1] * 100, "logprobs": [-5.0] * 100}]]
    new = [-2.0] * 99
    after = [[{"prompt": [1] * 100, "logprobs": [*new, -2.0]}]]
    assert verify.behaviour(before, after, [[[*new, -2.0]]], tolerance=0.06)["ok"]
    assert not verify.behaviour(before, after, [[[*new, bad]]], tolerance=0.06)["ok"]
