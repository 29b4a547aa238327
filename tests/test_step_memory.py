"""What a step takes of a GPU, and whether engines have to sleep for it. No GPU, no torch."""

from __future__ import annotations

import pytest

from colocate import memory
from colocate.config import Config, Schedule
from colocate.report import Report

GIB = memory.GIB


def samples(tokens: int) -> list[dict]:
    return [{"prompt": [0] * 8, "tokens": [0] * (tokens - 8)}]


def level_after(
    *steps: tuple[int, float, float], setting: int | str = "auto"
) -> tuple[memory.SleepLevel, list[int], Report]:
    """(the SleepLevel, what it chose for each step, the report). steps: (tokens, GiB before it, GiB it took)."""
    report = Report(Config(), [])
    level = memory.SleepLevel(setting, report)
    chosen = []
    for tokens, awake, step in steps:
        chosen.append(level.choose(samples(tokens)))
        used = awake * GIB
        assert level.note([(used, used), (used - GIB, 0)]) == [awake, awake]
        gpus = [{"total": 80 * GIB, "step": step * GIB}, {"total": 81 * GIB, "step": step * GIB / 2}]
        assert level.measure(samples(tokens), gpus) == {"step_gib": step}
    return level, chosen, report


def test_engines_sleep_in_the_first_step_and_stay_awake_once_it_is_known_to_fit(capsys):
    level, chosen, report = level_after((100, 40, 30), (100, 44, 26), (100, 44, 26))
    assert chosen == [2, 0, 0]
    said = capsys.readouterr().out
    assert said.count("[sleep]") == 1, "told once"
    assert "engines stay awake" in said and "takes 70.0 of 80.0 GiB, 90% may be taken" in said
    assert list(report.data["sleep_level_auto"]) == ["0"]
    level.forget()
    assert level.choose(samples(100)) == 2, "new trainers are measured again"


@pytest.mark.parametrize("step, chosen", [(32.0, 0), (32.1, 2)])
def test_a_tenth_of_the_gpu_stays_free(step, chosen):
    level = level_after((100, 40, step))[0]
    assert level.choose(samples(100)) == chosen


def test_a_longer_step_takes_more_than_the_measured_one():
    level, chosen, report = level_after((100, 40, 20), (160, 40, 20))
    assert chosen == [2, 0], "40 + 1.6 * 20"
    assert level.choose(samples(161)) == 0, "the longest step that was measured is the measure"
    assert level.choose(samples(400)) == 2 and level.choose(samples(50)) == 0
    assert set(report.data["sleep_level_auto"]) == {"0", "2"}


def test_a_short_step_does_not_replace_the_longest():
    level = level_after((100, 40, 40), (10, 44, 2))[0]
    assert level.choose(samples(100)) == 2


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_what_is_set_is_kept(setting, capsys):
    assert level_after((100, 40, 1), (100, 40, 1), setting=setting)[1] == [setting, setting]
    assert "[sleep]" not in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured():
    level = memory.SleepLevel("auto", Report(Config(), []))
    assert level.measure(samples(100), [{}, {}]) == {}
    assert level.choose(samples(100)) == level.deepest == 2


@pytest.mark.parametrize(
    "prompts, group, rehearsal, expected",
    [(8, 8, False, 64), (8, 32, False, 128), (9, 32, False, 160), (64, 64, False, 256), (64, 64, True, 64)],
)
def test_an_engine_has_its_whole_step_at_a_time(prompts, group, rehearsal, expected):
    config = Config(num_gpus=4, tensor_parallel_size=2, prompts_per_step=prompts, group_size=group)
    assert memory.max_num_seqs(config, rehearsal) == expected


def test_when_replicas_are_compared():
    def steps(first: int = 0, last: int = 24, **settings) -> list[int]:
        schedule = Schedule(Config(**settings), first + 1, last)
        return [step for step in range(first + 1, last + 1) if schedule.compares(step)]

    assert steps() == [1, 10, 20, 24]
    assert steps(first=12) == [13, 20, 24]
    assert steps(check_replicas_every=0) == [1, 24]
    assert steps(num_gpus=1, tensor_parallel_size=1) == [1, 24], "there is nothing to compare it with"
    assert steps(check_replicas_every=0, checkpoint="folder") == [1, 24]
    assert steps(check_replicas_every=0, checkpoint="folder", checkpoint_every=9) == [1, 9, 18, 24], "before each save"
    assert steps(last=3, check_replicas_every=1) == [1, 2, 3]


def test_the_wakes_of_a_push_are_stages_of_their_own():
    report = Report(Config(), [])
    reply = {"workers": [{"bytes": 3}], "wake_ms": 500.0, "wake_kv_ms": 250.0, "reset_ms": 1.0}
    quick = reply | {"wake_ms": 100.0, "wake_kv_ms": 300.0}
    for _ in range(2):
        report.stages_s["push"] = report.stages_s.get("push", 0) + 1.0
        report.step_seconds["push"] = report.step_seconds.get("push", 0) + 1.0
        report.spans.append(("push", 0.0, 1.0))
        push = report.pushed(1, "recorded", [quick, reply])
        assert (push["wall_ms"], push["bytes"], report.push_ms) == (250.0, 6, 250.0)
    assert report.stages_s == report.step_seconds == {"push": 0.5, "wake": 1.0, "wake KV": 0.5}
