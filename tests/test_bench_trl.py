"""bench_trl.py without a GPU, vLLM or TRL: arguments, the lengths of both sides, the file, and the tables from it."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import ROOT, deadline

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_trl
import tables
from trl_sides import (
    GROUP_SIZE,
    PROMPTS,
    SHORTEST,
    WARM_UP,
    Clock,
    Settings,
    ending_at,
    ours_arguments,
    reward,
    steps_of,
    trl_settings,
)

from colocate.config import Config

COMPLETIONS = GROUP_SIZE * len(PROMPTS)
ABOUT = {"hardware": "1 x NVIDIA H100 80GB HBM3", "date": "2026-11-25", "command": "python benchmarks/bench_trl.py"}


def settings(**fields) -> Settings:
    return Settings(**{"shape": "Qwen2.5-0.5B", "model": "model", "output": "side.json", "began": 0.0} | fields)


def parsed(*arguments: str):
    return bench_trl.parse(["--output", "out.json", *arguments])


# --- arguments


def test_both_sides_get_the_same_settings():
    args = parsed("--max-tokens", "128", "--learning-rate", "0.001", "--no-sleep", "--num-gpus", "2")
    made = bench_trl.settings_of(args, "ours-same", Path("model"), Path("side.json"))
    ours = Config.from_args(ours_arguments(made, "metrics.jsonl"))
    trl = trl_settings(made)
    assert ours.max_tokens == trl["max_completion_length"] == 128
    assert ours.learning_rate == trl["learning_rate"] == 0.001
    assert ours.steps == trl["max_steps"] == 2 * (WARM_UP + 10)
    assert ours.group_size == trl["num_generations"]
    assert ours.micro_batch_size == trl["per_device_train_batch_size"]
    assert ours.max_model_len == trl["vllm_max_model_length"]
    assert ours.gpu_memory_utilization == trl["vllm_gpu_memory_utilization"]
    assert ours.tensor_parallel_size == trl["vllm_tensor_parallel_size"]
    assert (ours.sleep_level, trl["vllm_enable_sleep_mode"]) == (0, False)
    # One optimizer step for each rollout.
    batch = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] * made.num_gpus
    assert batch == ours.prompts_per_step * ours.group_size == COMPLETIONS


@pytest.mark.parametrize("kind", bench_trl.KINDS)
def test_every_kind_of_run_has_a_name_in_the_table(kind):
    made = bench_trl.settings_of(parsed(), kind, Path("model"), Path("side.json"))
    side, _, variant = kind.partition("-")
    assert f"{side} {variant or 'default'}" in tables.SIDES
    assert made.correction == (not kind.endswith("-off"))
    assert made.weights == ("bfloat16" if "bf16" in kind else "float32")
    assert json.loads(bench_trl.command_of(kind, made)[-1])["lengths"] == ["full", "uneven"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--num-gpus", "3"], "64 completions"),
        (["--num-gpus", "2", "--tensor-parallel-size", "3"], "does not divide 2 GPUs"),
        (["--micro-batch-size", "48"], "--micro-batch-size 48"),
        (["--steps", "0"], "at least 1"),
        (["--only", "verl"], "invalid choice"),
    ],
)
def test_a_mistake_is_told(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(*arguments)
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


def test_no_run_starts_that_would_not_fit(tmp_path):
    (tmp_path / "Qwen2.5-0.5B-seed0.done").touch()  # the model is there
    output = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks/bench_trl.py"), "--output", str(output), "--only", "ours"]
    command += ["--folder", str(tmp_path), "--limit-s", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(60))
    assert (done.returncode, done.stdout.count("ours: left out")) == (0, 2), done.stdout + done.stderr
    assert not output.exists()


def test_a_side_that_takes_too_long_is_ended(tmp_path):
    # A shell's background job ignores SIGINT, and so would this.
    command = [sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_DFL); time.sleep(600)"]
    assert bench_trl.run(command, dict(os.environ), tmp_path / "log", 1) == "not ended after 1 s"
    assert bench_trl.run([sys.executable, "-c", "exit(5)"], dict(os.environ), tmp_path / "log", 60) == "exit code 5"


# --- lengths


class Params(SimpleNamespace):
    """What `ending_at` uses of vllm.SamplingParams."""

    def clone(self):
        return copy.copy(self)


def engine(asked: list):
    """vllm.LLM.generate: completions of as many tokens as asked, which hold the number of the request."""

    def generate(prompts, sampling_params, **options):
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.n == 1
            asked.append((prompt, params.max_tokens, params.seed))
            tokens = [len(asked) - 1] * params.max_tokens
            outputs.append(SimpleNamespace(prompt=prompt, outputs=[SimpleNamespace(index=0, token_ids=tokens)]))
        return outputs

    return generate


@pytest.mark.parametrize("num_gpus, tp", [(1, 1), (2, 2), (2, 1)])
def test_both_sides_have_the_same_lengths(num_gpus, tp):
    made = settings(num_gpus=num_gpus, tensor_parallel_size=tp, lengths=("full", "uneven"), steps=3)
    engines = num_gpus // tp
    uneven = WARM_UP + 3  # the first step of these
    together = []
    for number in range(engines):
        assert made.completion_lengths(uneven - 1, number) is None
        lengths = made.completion_lengths(uneven, number)
        ours: list = []
        theirs: list = []
        prompts = PROMPTS[number::engines]
        params = [Params(n=GROUP_SIZE, max_tokens=256, seed=1000 * i) for i in range(len(prompts))]
        groups = ending_at(engine(ours), lengths)(prompts, params, use_tqdm=False)
        # TRL asks for each completion with a prompt of its own, and has one object of parameters for all.
        repeated = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
        common = Params(n=1, max_tokens=256, seed=None)
        singles = ending_at(engine(theirs), lengths)(repeated, sampling_params=common, use_tqdm=False)
        assert [one[:2] for one in ours] == [one[:2] for one in theirs] == list(zip(repeated, lengths, strict=True))
        assert [seed for *_, seed in ours] == [1000 * i + k for i in range(len(prompts)) for k in range(GROUP_SIZE)]
        assert common.max_tokens == 256 and not any(seed for *_, seed in theirs)
        # Both get back what they have asked for, in its order.
        found = [done for group in groups for done in group.outputs]
        assert [done.index for done in found] == len(groups) * [*range(GROUP_SIZE)]
        assert [len(done.token_ids) for done in found] == [len(s.outputs[0].token_ids) for s in singles] == lengths
        together += lengths
    assert len(together) == COMPLETIONS
    assert min(together) >= SHORTEST and max(together) <= 256 and len(set(together)) > 20
    assert together != [length for e in range(engines) for length in made.completion_lengths(uneven + 1, e)]


def test_the_reward_is_of_the_ids():
    assert reward("", " 8 16 5 24") == 0.75
    assert reward("", "") == 0
    assert reward("", " 8a \u00b2 x") == 0  # bytes of their own


# --- rows


def report(walls: list[float], tokens: int) -> dict:
    """What a side writes."""
    steps = []
    at = 100.0
    for i, wall in enumerate(walls):
        parts = {"rollout_s": 0.5 * wall, "handover_s": 0.1 * wall, "score_s": 0.0, "train_s": 0.3 * wall}
        steps.append({"begun": at, "step_s": wall, **parts, "rest_s": 0.1 * wall, "tokens": tokens, "reward": i / 10})
        at += wall
    return {"versions": {"trl": "1.16.0"}, "steps": steps}


def rows(kind: str, second: float, **fields) -> list[dict]:
    """Of a run with one warm-up step of 9 s in each kind of lengths, and counted ones around so many seconds."""
    made = bench_trl.settings_of(parsed("--steps", "3"), kind, Path("model"), Path("side.json"))
    walls = 2 * [9.0, second, second, 0.5 * second, 1.5 * second]
    memory = bench_trl.GpuMemory()
    memory.samples = [(0.0, 70.0), (101.0, 40.0), (110.0, 30.0)]  # the first is of another run
    made_rows = bench_trl.rows_of(report(walls, 64 * 256), kind, made, memory)
    return [row | {"caches": "warm"} | fields for row in made_rows]


def test_a_step_of_ours_begins_with_its_push():
    seconds = {
        "rollout": 1.0,
        "sleep": 0.25,
        "reward": 0.125,
        "train": 0.5,
        "wake": 0.25,
        "push": 0.25,
        "wake KV": 0.25,
    }
    lines = [json.dumps({"step": i, "seconds": seconds, "tokens": 16, "reward": 0.5}) for i in (1, 2)]
    first, second = steps_of(lines, [10.0, 20.0, 30.0, 33.0, 37.0])  # two of the proof, two steps, the last one
    assert (first["begun"], first["step_s"], first["rest_s"]) == (30, 3, 0.5)
    assert (second["begun"], second["step_s"], second["handover_s"]) == (33, 4, 1)
    assert second["tokens"] == 16 and second["reward"] == 0.5 and second["score_s"] == 0


def test_stages_in_a_stage_are_not_counted_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(lambda: None)

    class Engine:
        def wake(self):
            now[0] += 4

        def generate(self):
            now[0] += 1
            self.wake()
            self.wake()

    clock.time(Engine, "wake", "handover")
    clock.time(Engine, "generate", "rollout")
    Engine().generate()
    assert clock.seconds == {"handover": 8, "rollout": 1}


def test_a_row_counts_what_follows_the_warm_up():
    full, uneven = rows("trl-fp32-off", 2.0)
    assert (full["lengths"], uneven["lengths"]) == ("full", "uneven")
    assert (full["side"], full["variant"], full["steps"]) == ("trl", "fp32-off", 3)
    assert (full["step_s_mean"], full["step_s_p50"], full["step_s_max"]) == (2.0, 2.0, 3.0)
    assert full["train_s"] == 0.6
    assert full["tokens_per_s"] == 16384
    assert full["peak_gib"] == 40
    assert uneven["peak_gib"] is None, "no sample is as late as these steps"
    assert full["reward"] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_rows_are_merged(tmp_path):
    output = tmp_path / "out.json"
    bench_trl.merge(output, rows("ours", 1.0), ABOUT | {"versions": {"ray": "2.60.0", "torch": "2.11.0"}})
    later = ABOUT | {"date": "2026-11-26", "hardware": "1 x H200"}
    bench_trl.merge(output, rows("trl-fp32", 3.0), later | {"versions": {"trl": "1.16.0", "torch": "2.11.0"}})
    found = json.loads(output.read_text())
    assert [row["side"] for row in found["rows"]] == ["ours", "ours", "trl", "trl"]
    assert [row["date"] for row in found["rows"]] == ["2026-11-25"] * 2 + ["2026-11-26"] * 2
    assert {row["hardware"] for row in found["rows"]} == {ABOUT["hardware"], "1 x H200"}
    assert found["versions"] == {"ray": "2.60.0", "torch": "2.11.0", "trl": "1.16.0"}
    assert found["date"] == "2026-11-26"


# --- tables


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Let the tables read these rows."""

    def record(*groups: list[dict]) -> None:
        every = [row | ABOUT for group in groups for row in group]
        (tmp_path / "trl-1xh100.json").write_text(json.dumps(ABOUT | {"versions": {}, "rows": every}))

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return record


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_without_a_file_nothing_is_claimed(recorded):
    assert tables.trl_steps() == "TRL: not measured."
    assert {measured for _, measured, _ in cells(tables.trl_goals()).values()} == {"not measured"}


def test_the_goals_are_ratios_to_the_better_of_trls(recorded):
    recorded(rows("ours", 1.0), rows("ours", 1.2), rows("trl-fp32", 4.0), rows("trl-bf16", 2.0, peak_gib=20.0))
    found = cells(tables.trl_goals())
    assert found["step, full lengths, correction on"] == ["≤ 0.60 ×", "0.55 ×", "yes"]
    assert found["step, uneven lengths, correction on"] == ["≤ 0.50 ×", "0.55 ×", "no"]
    assert found["step, full lengths, correction off"][1:] == ["not measured", "–"]
    assert found["train, full lengths"][1:] == ["0.330 s", "yes"]
    assert found["longest step, full lengths, beside the median"][1:] == ["1.50 ×", "no"]
    assert found["hand-over, full lengths"][1] == "0.55 ×"
    assert found["peak GPU memory, beside float32 weights"][1:] == ["1.00 ×", "yes"]
    assert found["start to first step, warm caches"][2] == "no"
    assert found["start to first step, cold caches"][1] == "not measured"


def test_each_side_has_a_line(recorded):
    recorded(rows("ours", 1.0), rows("ours", 3.0), rows("trl-bf16-off", 2.0))
    lines = [line.split(" | ") for line in tables.trl_steps().splitlines()[2:]]
    assert len(lines) == 4, "two kinds of lengths of two sides"
    first = lines[0]
    assert first[0] == "| [1 × H100 80GB HBM3](../results/trl-1xh100.json)"
    assert first[1:7] == ["Qwen2.5-0.5B, 1 × TP=1", "full", "ours", "2.000", "2.000", "4.500"]
    assert first[-1] == "2 × 3 |"
    assert lines[2][3] == "TRL, bf16 weights, correction off"


def test_hosts_are_not_mixed(recorded, tmp_path):
    recorded(rows("ours", 1.0), rows("trl-bf16", 4.0))
    other = [row | ABOUT for row in rows("ours", 3.0) + rows("trl-bf16", 5.0)]
    (tmp_path / "trl-1xh100-other.json").write_text(json.dumps(ABOUT | {"versions": {}, "rows": other}))
    found = cells(tables.trl_goals())["step, full lengths, correction on"]
    assert found == ["≤ 0.60 ×", "0.60 ×, 0.25 ×", "yes"]
    assert cells(tables.trl_goals())["step, uneven lengths, correction on"][2] == "no", "one of the two misses it"


def test_rewards_are_compared_where_three_seeds_are_there(recorded, tmp_path):
    def learn(side: str, seed: int, reward: float) -> None:
        report = {
            "side": side,
            "rewards": 30 * [reward],
            "versions": {"trl": "1.16.0"},
            "config": {"correction": "none"},
        }
        (tmp_path / f"learn-smollm2-{side}-seed{seed}.json").write_text(json.dumps(report))

    for seed in range(3):
        learn("ours", seed, 0.2 + seed / 10)
        if seed < 2:
            learn("trl", seed, 0.3 + seed / 10)
    assert tables.rewards_apart() == "Rewards of seeds: not measured."
    learn("trl", 2, 0.5)
    assert cells(tables.rewards_apart())["`rlhf_colocate.py`"][2:] == ["0.100", "0.50 ×"]
