"""Prompts and rewards: what a step asks, what text comes back, and one line for each mistake. No vLLM, no Ray."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from running import ROOT, deadline, eventually

import rlhf_colocate as rc
from colocate.config import FAIL, LONGEST_PROMPT, MISSING, USAGE, Config, Stop, check_loop
from colocate.memory import rehearsal_kv_bytes
from colocate.model_folder import Model
from colocate.prompts import Prompt, json_lines, read_prompts
from colocate.rewards import Answer, Workers, load_reward
from colocate.tasks import Task, check_task, multiples_of_8, token_prompts

TEXTS = [
    "The capital of France is",
    "Water boils at",
    "To make tea, first you",
    "The first president was",
    "Ünïcödé 🫖",
]


def length_of_both(prompt: str, completion: str) -> float:
    return len(prompt) + len(completion)


def save_tokenizer(folder: Path, kind: str) -> Path:
    """A real tokenizer, trained on a few words. byte-level: as GPT-2's, without BOS; metaspace: as Llama-2's, with."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    if kind == "byte-level":
        it = Tokenizer(models.BPE())
        it.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        it.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
    else:
        it = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        it.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        it.decoder = decoders.Sequence(parts)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        letters = []
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False)
    it.train_from_iterator(TEXTS[:4], trainer)
    if kind == "metaspace":
        it.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", it.token_to_id("<s>"))]
        )
        state = json.loads(it.to_str())
        state["added_tokens"] = state["added_tokens"][:2]  # bytes are ordinary tokens
        it = Tokenizer.from_str(json.dumps(state))
    folder.mkdir(exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=it, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def model(request, tmp_path_factory) -> Model:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer") / request.param, request.param)
    return Model(folder, folder, "auto", {"vocab_size": 600}, has_tokenizer=True)


@pytest.fixture
def bare(tmp_path) -> Model:
    """A model without a tokenizer."""
    return Model(tmp_path, tmp_path, "dummy", {"vocab_size": 500})


@pytest.fixture
def file(tmp_path):
    """Writes a file, and returns its path."""

    def write(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


def task(model: Model, **settings) -> Task:
    """Rewards in this process, which is quicker, and two prompts a step."""
    return Task(Config(**{"reward_workers": 0, "prompts_per_step": 2} | settings), model, TEXTS, length_of_both)


def worth(it: Task, prompt, tokens: list[int]) -> float:
    """What the reward says of one answer."""
    sample = {"tokens": tokens}
    it.score([prompt], [sample])
    return sample["reward"]


def message(code: int, function, *args) -> str:
    """Of the Stop that this must raise, in one line."""
    with pytest.raises(Stop) as stop:
        function(*args)
    assert stop.value.code == code and "\n" not in str(stop.value)
    return str(stop.value)


# ---------------------------------------------------------------------------------------------------------------------
# What a step asks
# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_come_in_turns_and_the_same_for_the_same_step(model):
    it = task(model, prompts_per_step=3)
    assert [[p.text for p in it.prompts(step)] for step in (0, 1)] == [TEXTS[:3], [TEXTS[3], TEXTS[4], TEXTS[0]]]
    assert it.prompts(7) == task(model, prompts_per_step=3).prompts(7)
    assert [p.token_ids for p in it.prompts(0)][:3] == it.proof_prompts()[:3] and len(it.proof_prompts()) == 4
    assert it.prompts(0)[0].row == {"prompt": TEXTS[0]}


def test_prompts_have_the_special_tokens_that_vllm_gives_them(model):
    it = task(model)
    bos = [it.tokenizer.bos_token_id] if model.folder.name == "metaspace" else []
    assert it.proof_prompts()[0] == bos + it.tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert it.stop_token_ids == [it.tokenizer.eos_token_id]


def test_seeds_of_steps_and_runs_are_apart(model):
    assert task(model, seed=2).seed(3) == 1_000_000 * 2003


def test_a_model_without_a_tokenizer_gets_token_ids(bare):
    it = task(bare, seed=5, prompts_per_step=3)
    assert it.proof_prompts() == token_prompts(bare.config, 5, 4, 48)
    assert [p.token_ids for p in it.prompts(2)] == token_prompts(bare.config, "5 2", 3, 16)
    assert {p.text for p in it.prompts(2)} == {None} and it.stop_token_ids == []
    assert all(10 <= t < 500 for ids in it.proof_prompts() for t in ids)
    assert worth(it, it.prompts(0)[0], [8, 16, 3, 5]) == 0.5 == multiples_of_8([8, 16, 3, 5])
    assert it.text([8, 16]) == [8, 16]
    assert (
        task(Model(bare.folder, bare.folder, "dummy", {"text_config": {"vocab_size": 11}})).proof_prompts()[0]
        == [10] * 48
    )


# ---------------------------------------------------------------------------------------------------------------------
# What comes back
# ---------------------------------------------------------------------------------------------------------------------


def decoded_by_vllm(it: Task, prompt: list[int], tokens: list[int]) -> str:
    """As vLLM's FastIncrementalDetokenizer does it, token by token after the prompt."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    return "".join(stream.step(it.tokenizer.backend_tokenizer, t) or "" for t in tokens)


@pytest.mark.parametrize(
    "completion", ["Paris", " Paris, first", "president ", "", " ", "\n\n", "🫖 tea", "ü", "a  b "]
)
def test_text_is_what_vllm_would_decode(model, completion):
    it = task(model)
    prompt = it.proof_prompts()[0]
    tokens = it.tokenizer(completion, add_special_tokens=False)["input_ids"]
    for end in range(len(tokens) + 1):  # also in the middle of a character
        assert it.text(tokens[:end]) == decoded_by_vllm(it, prompt, tokens[:end])
    assert it.text([*tokens, it.tokenizer.eos_token_id]) == it.text(tokens)
    assert worth(it, it.prompts(0)[0], tokens) == len(it.prompts(0)[0].text) + len(it.text(tokens))


def test_the_scripts_own_reward():
    assert rc.reward("x", "All Words Begin Upper Case") == 1
    assert rc.reward("x", "one Two three Four") == 0.5
    assert rc.reward("x", "A") == 0.25, "one word is not a way around it"
    assert rc.reward("x", "") == 0


# ---------------------------------------------------------------------------------------------------------------------
# --prompts
# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_replace_the_scripts(model, file):
    path = file("q.jsonl", '{"prompt": "1 + 1 =", "answer": "2"}\n\n{"prompt": "tea\\n", "answer": 3}')
    it = task(model, prompts=path, prompts_per_step=2)
    assert [p.text for p in it.prompts(1)] == ["1 + 1 =", "tea\n"]
    assert it.prompts(0)[1].row == {"prompt": "tea\n", "answer": 3}
    assert len(it.proof_prompts()) == 2


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "q.jsonl is empty"),
        ("\n \n", "q.jsonl is empty"),
        ('{"prompt": "a"}\n\n{"prompt": }', "line 3 is no JSON in UTF-8 (Expecting value)"),
        ('{"prompt": "a"}\n["b"]', "line 2 is no JSON object"),
        ('{"prompt": []}', 'line 1 has no "prompt" that is a string or a list of chat messages'),
        ('{"prompt": [{"role": "user"}]}', 'line 1 has no "prompt" that is a string'),
        ('{"prompt": ["a"]}', 'line 1 has no "prompt" that is a string'),
        (b'{"prompt": "\xff"}', "line 1 is no JSON in UTF-8"),
        ('{"prompt": "\\ud83e"}', "line 1 is no JSON in UTF-8"),
        ("[" * 100_000, "line 1 is no JSON in UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(content, says, file):
    config = Config(prompts=file("q.jsonl", content), prompts_per_step=1)
    assert says in (said := message(USAGE, check_task, config)) and 'like {"prompt": "1 + 1 ="' in said


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "q.jsonl cannot be read: No such file" in message(USAGE, read_prompts, str(tmp_path / "q.jsonl"))
    assert "q.csv cannot be read: No such file" in message(USAGE, read_prompts, str(tmp_path / "q.csv"))
    assert "cannot be read: Is a directory" in message(USAGE, json_lines, tmp_path, "--prompts q", "prompt")


def test_a_missing_column_is_refused_with_those_that_are_there(model, file):
    path = file("q.jsonl", '{"question": "1 + 1 =", "answer": "2"}')
    said = message(USAGE, check_task, Config(prompts=path, prompts_per_step=1))
    assert said.endswith("It has question, answer. Try: --prompt-column question")
    it = task(model, prompts=path, prompt_column="question", prompts_per_step=1)
    assert it.prompts(0)[0].text == "1 + 1 =" and it.prompts(0)[0].row["answer"] == "2"


# ---------------------------------------------------------------------------------------------------------------------
# --prompts, by the library `datasets`
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "1 + 1 =", "answer": 2}, {"prompt": "tea", "answer": 3}, {"prompt": "Water", "answer": 4}]


def written(folder: Path, kind: str) -> str:
    """ROWS in a file or folder of this kind."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "json":
        (folder / "q.json").write_text(json.dumps(ROWS))
    elif kind in ("csv", "parquet"):
        getattr(rows, f"to_{kind}")(folder / f"q.{kind}")
    elif kind == "folder":  # as a hub dataset's
        (folder / "q.folder").mkdir()
        rows.to_parquet(folder / "q.folder" / "train-0.parquet")
    elif kind == "saved":
        rows.save_to_disk(folder / "q.saved")
    else:
        datasets.DatasetDict(train=rows).save_to_disk(folder / "q.splits")
    return str(folder / f"q.{kind}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "saved", "splits"])
def test_the_library_datasets_reads_other_kinds(kind, model, tmp_path, cache):
    it = task(model, prompts=written(tmp_path, kind), prompts_per_step=3)
    assert [p.row for p in it.prompts(0)] == ROWS


def test_a_split_is_a_part(model, tmp_path, cache, file):
    path = written(tmp_path, "csv")
    assert [*read_prompts(path, split="train[1:2]").values()] == [ROWS[1]]
    lines = file("q.jsonl", "\n".join(map(json.dumps, ROWS)))
    assert [*read_prompts(lines, split="train[2:]").values()] == [ROWS[2]]
    said = message(USAGE, check_task, Config(prompts=path, split="test"))
    assert "q.csv cannot be read (" in said and said.endswith("Check the file, --split test")


@pytest.mark.parametrize("name, content", [("q.json", "{"), ("q.parquet", "no parquet")])
def test_a_file_that_datasets_cannot_read_is_refused(name, content, file, cache):
    assert f"{name} cannot be read (" in message(USAGE, check_task, Config(prompts=file(name, content)))


@pytest.mark.parametrize("name", ["q.json", "q.csv", "q.parquet"])
def test_an_empty_file_is_said_to_be_empty(name, file, cache):
    assert f"{name} is empty. Give a file with" in message(USAGE, check_task, Config(prompts=file(name, "")))


def test_an_empty_folder_is_refused(tmp_path, cache):
    assert "cannot be read (" in message(USAGE, check_task, Config(prompts=str(tmp_path)))


def test_datasets_is_asked_for_where_it_is_needed(file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = message(MISSING, check_task, Config(prompts=file("q.csv", "prompt\ntea\n")))
    assert said.endswith("is read by the library datasets, which is not installed. Try: pip install datasets")


# ---------------------------------------------------------------------------------------------------------------------
# Chats
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"
TEMPLATE += "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
TEMPLATE += "{% if add_generation_prompt %};<assistant>{% endif %}"
HELLO = [{"role": "user", "content": "tea"}]


@pytest.fixture
def chat_model(tmp_path) -> Model:
    folder = save_tokenizer(tmp_path / "tokenizer", "byte-level")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    return Model(folder, folder, "auto", {"vocab_size": 600}, has_tokenizer=True)


def chats(file, *messages: list[dict] | str) -> dict:
    """Flags for prompts that are these chats."""
    path = file("q.jsonl", "\n".join(json.dumps({"prompt": m, "answer": "2"}) for m in messages))
    return {"prompts": path, "prompts_per_step": len(messages)}


def test_chats_go_through_the_tokenizers_template(chat_model, file):
    began = [*HELLO, {"role": "assistant", "content": "Well"}]
    first, second = task(chat_model, **chats(file, HELLO, began)).prompts(0)
    assert (first.text, second.text) == ("<user>tea;<assistant>", "<user>tea;<assistant>Well")
    it = task(chat_model, **chats(file, HELLO, began))
    assert first.token_ids == it.tokenizer(first.text, add_special_tokens=False)["input_ids"]
    assert first.messages == HELLO and first.row["prompt"] == HELLO
    assert it.stop_token_ids == [1, 7], "those of the generation config end a completion, too"


def test_a_system_message_makes_chats(chat_model, file):
    own = [{"role": "system", "content": "Hm"}, *HELLO]
    it = task(chat_model, **chats(file, "Water", HELLO, own), system="Be brief")
    assert [p.text for p in it.prompts(0)] == [
        "<system>Be brief;<user>Water;<assistant>",
        "<system>Be brief;<user>tea;<assistant>",
        "<system>Hm;<user>tea;<assistant>",
    ]
    assert it.proof_prompts() == [p.token_ids for p in it.prompts(0)]


def test_a_chat_without_a_template_is_refused(model, chat_model, file):
    config = Config(**chats(file, HELLO), model="tiny")
    said = message(USAGE, Task, config, model, TEXTS, length_of_both)
    assert "q.jsonl, line 1 is a chat, and the tokenizer of tiny has no chat template. Give a --model" in said
    tool = file("t.jsonl", json.dumps({"prompt": [{"role": "tool", "content": "5"}]}))
    config = Config(prompts=tool, prompts_per_step=1, model="tiny")
    said = message(USAGE, Task, config, chat_model, TEXTS, length_of_both)
    assert "line 1 does not fit the chat template of tiny (no tools). Check the roles" in said


def test_strings_that_stop_are_found_by_the_engine(model):
    assert task(model).sampling() == {
        "n": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 16,
        "stop_token_ids": [task(model).tokenizer.eos_token_id],
    }
    assert task(model, stop=("\n", "END")).sampling()["stop"] == ["\n", "END"]
    assert Config.from_args(["--stop", "\n", "--stop", "END"]).stop == ("\n", "END")


def test_prompts_may_come_by_a_pipe(model):
    """It can be read once only, and is read before the model is known."""
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "tea"}\n')
    os.close(writer)
    config = Config(prompts=f"/dev/fd/{reader}", prompts_per_step=1)
    check_task(config)
    os.close(reader)
    assert [p.text for p in Task(config, model, TEXTS, length_of_both).prompts(0)] == ["tea"]


def test_a_prompt_that_is_too_long_is_refused_by_its_line(model, file):
    rows = [{"prompt": "tea"}, {"prompt": "🫖" * 30}, {"prompt": "🫖" * 20}]
    path = file("q.jsonl", "\n".join(map(json.dumps, rows)))
    whole = {"prompts": path, "max_tokens": 16, "max_model_len": 512}
    lengths = [len(p.token_ids) for p in task(model, **whole, prompts_per_step=3).prompts(0)]
    longest = max(lengths)
    task(model, **whole | {"max_model_len": longest + 16})
    config = Config(**whole | {"max_model_len": longest + 15})
    said = message(USAGE, Task, config, model, TEXTS, length_of_both)
    assert f"q.jsonl, line 2 is a prompt of {longest} tokens; --max-model-len {longest + 15} leaves" in said
    assert said.endswith(f"Try: --overlong drop, or --max-model-len {longest + 16}")
    config = Config(**whole, max_prompt_length=lengths[0])
    said = message(USAGE, Task, config, model, TEXTS, length_of_both)
    assert f"line 2 is a prompt of {longest} tokens, the first of 2 that are too long; --max-prompt-length is" in said
    it = task(model, **whole, max_prompt_length=longest - 1, overlong="drop")
    assert [p.row for p in it.prompts(0)] == [rows[0], rows[2]]
    assert it.notes == [f"1 of 3 prompts have more than {longest - 1} tokens, and are left out (--overlong drop)"]
    config = Config(**whole, max_prompt_length=lengths[0], overlong="drop", prompts_per_step=2)
    assert "has 1 prompts, fewer than" in message(USAGE, Task, config, model, TEXTS, length_of_both)


def test_a_prompt_of_the_script_has_its_own_limit(model):
    config = Config()
    said = message(USAGE, Task, config, model, ["tea", "🫖" * 20], length_of_both)
    assert said.startswith("PROMPTS[1] is a prompt of ") and "--prompts FILE.jsonl" in said
    assert "PROMPTS is empty" in message(USAGE, Task, config, model, [], length_of_both)


def test_a_prompt_without_tokens_is_refused(file, tmp_path):
    folder = save_tokenizer(tmp_path / "tokenizer", "byte-level")  # without BOS, an empty prompt is no token at all
    path = file("q.jsonl", '{"prompt": "tea"}\n{"prompt": ""}')
    model = Model(folder, folder, "auto", {"vocab_size": 600}, has_tokenizer=True)
    assert "q.jsonl, line 2 is an empty prompt" in message(USAGE, task_of_file, model, path)


def test_a_file_with_fewer_prompts_than_a_step_is_refused(file):
    config = Config(prompts=file("q.jsonl", '{"prompt": "tea"}\n' * 3), prompts_per_step=4)
    said = message(USAGE, check_task, config)
    assert "q.jsonl has 3 prompts, fewer than --prompts-per-step 4. Try: --prompts-per-step 3" in said


def task_of_file(model: Model, path: str) -> Task:
    return task(model, prompts=path)


def test_prompts_of_a_file_may_fill_the_context(file):
    """The script's own are reckoned with 48 tokens, in --max-model-len and in the rehearsal's KV cache."""
    path = file("q.jsonl", '{"prompt": "tea"}')
    check_loop(Config(max_tokens=400, max_model_len=448))
    said = message(USAGE, check_loop, Config(max_tokens=400, max_model_len=447))
    assert "too short for prompts of 48 tokens and --max-tokens 400. Try: --max-model-len 448" in said
    check_loop(Config(max_tokens=400, max_model_len=401, prompts=path))
    assert "too short for a prompt" in message(
        USAGE, check_loop, Config(max_tokens=400, max_model_len=400, prompts=path)
    )
    assert Config().longest_prompt == 48 and Config(prompts=path, max_tokens=400).longest_prompt == 112
    shape = {"num_attention_heads": 8, "hidden_size": 2048, "num_hidden_layers": 16}
    assert rehearsal_kv_bytes(Config(prompts=path), shape) == rehearsal_kv_bytes(Config(max_tokens=464), shape)


def test_text_without_a_tokenizer_is_refused(bare, file):
    prompts = file("q.jsonl", '{"prompt": "tea"}')
    reward = file("mine.py", "def reward(prompt, completion): return 1") + ":reward"
    said = message(USAGE, Task, Config(prompts=prompts, model="tiny"), bare, TEXTS, length_of_both)
    assert said == "--prompts: text needs a tokenizer, and tiny has none. Give a --model that has one"
    said = message(USAGE, Task, Config(prompts=prompts, reward=(reward,)), bare, TEXTS, length_of_both)
    assert said.startswith("--prompts and --reward: text needs a tokenizer, and the default model here has none")


# ---------------------------------------------------------------------------------------------------------------------
# --reward
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reward_of_a_file_replaces_the_scripts(model, file):
    file("neighbour.py", "WORTH = 2")
    code = "from neighbour import WORTH\ndef mine(prompt, completion): return WORTH * (completion.strip() == 'tea')"
    it = task(model, reward=(file("mine.py", code) + ":mine",))
    tea, water = (it.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("tea", "water"))
    assert [worth(it, it.prompts(0)[0], tokens) for tokens in (tea, water)] == [2, 0]


@pytest.mark.parametrize("signature", ["prompt, completion, row", "p, c, *, row=None", "p, c, **row"])
def test_a_reward_gets_the_prompts_row_if_it_takes_it(signature, model, file):
    rows = file("q.jsonl", '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": 7}')
    answer = "row['row']['answer']" if "**" in signature else "row['answer']"
    it = task(model, prompts=rows, reward=(file("mine.py", f"def f({signature}): return {answer}") + ":f",))
    assert [worth(it, prompt, [5]) for prompt in it.prompts(0)[:2]] == [5, 7]


@pytest.mark.parametrize("value", ["True", "3", "__import__('numpy').float32(2.5)", "__import__('torch').tensor(0.5)"])
def test_numbers_of_all_kinds_are_rewards(value, model, file):
    it = task(model, reward=(file("mine.py", f"def f(p, c): return {value}") + ":f",))
    assert worth(it, it.prompts(0)[0], [5]) == float(eval(value))


@pytest.mark.parametrize(
    "value", ["None", "'1'", "float('nan')", "float('inf')", "10**400", "[1.0]", "__import__('torch').ones(2)"]
)
def test_a_reward_must_be_a_finite_number(value, model, file):
    it = task(model, reward=(file("mine.py", f"def f(p, c): return {value}") + ":f",))
    said = message(FAIL, worth, it, it.prompts(0)[0], [5])
    assert said.startswith(f"reward: mine.py:f returned {repr(eval(value))[:90]}")
    assert "for the prompt 'The capital of France is' and the completion '" in said
    assert said.endswith("'. It must return a finite number")


def test_a_reward_that_raises_is_named_with_its_line_and_prompt(model, file, capsys):
    code = "import json\n\ndef f(prompt, completion):\n    return helper(completion)\n\n"
    code += "def helper(text):\n    return json.loads('no')\n"
    it = task(model, reward=(file("mine.py", code) + ":f",), verbose=True)
    said = message(FAIL, worth, it, it.prompts(0)[0], [5])
    assert said.startswith(
        "reward: mine.py:f raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) (mine.py, "
    )
    assert "line 7) for the prompt 'The capital of France is' and the completion '" in said
    assert "return json.loads('no')" in capsys.readouterr().err, "--verbose shows the traceback"
    own = Task(Config(), model, TEXTS, lambda prompt, completion: prompt / 2)
    said = message(FAIL, worth, own, own.prompts(0)[0], [5])
    assert "reward: reward raised TypeError: unsupported operand" in said and "(test_tasks.py, line " in said
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "code, name, says",
    [
        ("def reward(p, c): return 1", "rewrad", "has no function rewrad; it has reward. Try: --reward "),
        ("X = 1", "X", "has no function X; it has none"),
        ("import math\nimport no_such_module\n", "f", "(mine.py, line 2). Try: python "),
        ("def f(p, c):\n    return (\n", "f", "SyntaxError: '(' was never closed (mine.py, line 2). Try: python "),
        ("def f(p, c):\n    return 1\nraise SystemExit(3)\n", "f", "SystemExit: 3 (mine.py, line 3)"),
        ("def f(prompt): return 1", "f", "mine.py:f(prompt) does not take a prompt and a completion"),
        ("def f(p, c, tokens): return 1", "f", "mine.py:f(p, c, tokens) does not take a prompt and a completion"),
        ("def f(p, c, row, /): return 1", "f", "does not take a prompt and a completion"),
    ],
)
def test_a_file_without_such_a_reward_is_refused(code, name, says, file):
    path = file("mine.py", code)
    assert says in message(USAGE, check_task, Config(reward=(f"{path}:{name}",)))


@pytest.mark.parametrize(
    "where, says",
    [
        ("mine.py", "Try: --reward mine.py:reward"),
        ("mine.py:", "is no FILE.py:FUNCTION"),
        ("mine:f", "is no FILE.py:FUNCTION"),
        ("mine.py:a b", "is no FILE.py:FUNCTION"),
        ("/nowhere/mine.py:f", "there is no file /nowhere/mine.py"),
    ],
)
def test_a_reward_is_a_file_and_a_function(where, says):
    assert says in message(USAGE, load_reward, where)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards that are written for TRL, several of them, and their processes
# ---------------------------------------------------------------------------------------------------------------------

# From here on as a user has it: lists in, a list out, and columns by their names.
TRL = """
def right(completions, answer, **kwargs):
    assert kwargs["prompts"][0] and len(kwargs["completion_ids"]) == len(completions)
    return [1.0 if a in c else None for c, a in zip(completions, answer)]

def chat(prompts, completions):
    return [len(p[-1]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]

def few(completions, **kwargs):
    return [1.0]

def one(completions, **kwargs):
    return 1.0

def bad(completions, answer, **kwargs):
    return [float("nan") for _ in completions]

def wrong(completions, answer, solution):
    return [0.0 for _ in completions]

def length(prompt, completion):
    return len(completion.strip())
"""


def answered(it: Task, *texts: str) -> list[dict]:
    return [{"tokens": it.tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]


@pytest.fixture
def trl(file):
    path = file("trl.py", TRL)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reward_of_trl_runs_unchanged_beside_a_plain_one(workers, model, file, trl):
    rows = chats(file, "1 + 1 =", "2 + 2 =")
    both = {"reward": trl("right", "length"), "reward_weights": "2,-0.5", "reward_workers": workers}
    it = task(model, **rows, **both)
    samples = answered(it, "2", "tea", "22", "")
    it.score(it.prompts(0), samples)
    assert [s["reward"] for s in samples] == [1.5, -1.5, 1.0, 0.0]
    assert samples[1]["rewards"] == {"trl.py:right": None, "trl.py:length": 3}
    if workers:
        it.workers.kill()


def test_a_reward_of_trl_gets_chats_as_messages(chat_model, file, trl):
    it = task(chat_model, **chats(file, HELLO), reward=trl("chat"))
    samples = answered(it, "two!")
    it.score(it.prompts(0), samples)
    assert samples[0]["reward"] == len("tea") + len("two!") and "rewards" not in samples[0]


@pytest.mark.parametrize(
    "name, says",
    [
        ("few", r"trl.py:few returned 1 values for 2 completions, the first one for the prompt '1 \+ 1 ='"),
        ("one", "trl.py:one returned 0 values for 2 completions, the first one"),
        (
            "bad",
            r"bad returned nan for the prompt '1 \+ 1 =' and the completion ' ?tea'\. It must return a finite number",
        ),
        (
            "right",
            r"right returned None for the prompt '1 \+ 1 =' and the completion ' ?tea'\. One must return a number",
        ),
    ],
)
def test_what_is_wrong_with_a_reward_of_trl_is_named(name, says, model, file, trl):
    it = task(model, **chats(file, "1 + 1 ="), reward=trl(name))
    assert re.search(says, message(FAIL, it.score, it.prompts(0), answered(it, "tea", "tea")))


def test_a_reward_of_trl_may_log_and_wait(model, file):
    code = "async def f(completions, log_metric, log_extra, **columns):\n    log_metric('length', 1.0)\n"
    code += "    log_extra('text', completions)\n    return [len(c) for c in completions]\n"
    it = task(model, **chats(file, "1 + 1 ="), reward=(file("mine.py", code) + ":f",))
    samples = answered(it, "tea", "2")
    it.score(it.prompts(0), samples)
    assert [s["reward"] for s in samples] == [len(it.text(s["tokens"])) for s in samples]


def test_what_trls_trainer_alone_has_is_refused(file):
    code = "def f(completions, trainer_state, **columns):\n    return [0.0 for c in completions]\n"
    config = Config(**chats(file, "1 + 1 ="), reward=(file("mine.py", code) + ":f",))
    assert "mine.py:f wants trainer_state, which TRL's trainer has" in message(USAGE, check_task, config)


def test_a_column_that_the_evaluation_lacks_is_named_before_anything_slow(file, trl):
    held_out = file("eval.jsonl", json.dumps({"prompt": "3 + 3 ="}))
    config = Config(**chats(file, "1 + 1 ="), reward=trl("right"), eval_prompts=held_out)
    said = message(USAGE, check_task, config)
    assert "trl.py:right wants answer, and the prompts have only prompt. Give --eval-prompts with it" in said


def test_an_evaluation_must_have_a_prompt_left(model, file):
    held_out = file("eval.jsonl", json.dumps({"prompt": "word " * 200, "answer": "2"}))
    options = {**chats(file, "1 + 1 ="), "max_prompt_length": 20, "overlong": "drop"}
    said = message(USAGE, lambda: task(model, **options, eval_prompts=held_out))
    assert "has no prompt of at most 20 tokens. Try: --overlong error" in said


def test_prompts_of_an_evaluation_alone_may_fill_the_context(model, file):
    held_out = file("eval.jsonl", json.dumps({"prompt": "word " * 60}))
    assert len(task(model, eval_prompts=held_out).held_out[0].token_ids) > LONGEST_PROMPT


@pytest.mark.parametrize("arguments", ["a", "generate, prompts, task, more"])
def test_a_rollout_that_takes_other_arguments_is_refused_early(arguments, file):
    config = Config(rollout=file("turns.py", f"def f({arguments}):\n    return []\n") + ":f")
    said = message(USAGE, check_task, config)
    assert f"turns.py:f({arguments}) does not take three arguments. Try: def f(generate, prompts, task)" in said


def test_a_column_that_is_missing_is_named_before_anything_slow(file, trl):
    config = Config(**chats(file, "1 + 1 ="), reward=trl("wrong"))
    assert "trl.py:wrong wants solution, and the prompts have only prompt, answer" in message(USAGE, check_task, config)


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "1,nan", ","])
def test_weights_are_a_number_for_each_reward(weights, trl):
    said = message(USAGE, check_loop, Config(reward=trl("length", "right"), reward_weights=weights))
    assert f"--reward-weights {weights} is not a number for each of 2 --reward. Try: --reward-weights 1,1" in said


HANGING = """
import os, time

def hangs(prompt, completion, row):
    if row["answer"] == "hang":
        time.sleep(1000)
    return 1

def dies(prompt, completion, row):
    os._exit(3)

def raises(prompt, completion, row):
    raise KeyError("no such thing")
"""


@pytest.mark.parametrize(
    "name, says",
    [
        ("hangs", "did not return within 1 s for the prompt 'second' and the completion "),
        ("dies", "ended its process for the prompt 'first'"),
        ("raises", "raised KeyError: 'no such thing' (hanging.py, line 13) for the prompt 'first'"),
    ],
)
def test_a_reward_that_hangs_or_dies_is_named_with_its_prompt(name, says, model, file, capsys):
    rows = [{"prompt": "first", "answer": "no"}, {"prompt": "second", "answer": "hang"}]
    path = file("q.jsonl", "\n".join(map(json.dumps, rows)))
    options = {"prompts": path, "reward": (file("hanging.py", HANGING) + ":" + name,), "stage_timeout": "reward=1"}
    it = task(model, **options, reward_workers=1, verbose=True)
    said = message(FAIL, it.score, it.prompts(0), answered(it, "tea", "tea"))
    assert said.startswith(f"reward: hanging.py:{name} {says}")
    assert name != "raises" or "no such thing" in capsys.readouterr().err
    assert not multiprocessing.active_children(), "it is cut off"


def test_ctrl_c_ends_a_reward_that_hangs(file):
    rows = [{"prompt": "p", "answer": "hang"}]
    answers = [Answer(Prompt([], row["prompt"], row), "c", []) for row in rows]
    workers = Workers(1, 100)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            workers(file("hanging.py", HANGING) + ":hangs", answers)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


def test_a_script_that_runs_when_it_is_imported_is_told(file, tmp_path):
    script = file("mine.py", f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from colocate.config import Stop
        from colocate.rewards import Workers
        try:
            Workers(1, 10)
        except Stop as stop:
            print(stop)
    """)  # fmt: skip
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=deadline(60))
    assert done.stdout.splitlines()[-1].startswith("The processes for --reward did not start. Try: --reward-workers 0")


def test_the_processes_of_rewards_end_with_the_driver(file):
    """However it ends: here it is killed while a reward is computed."""
    reward = file("hanging.py", HANGING) + ":hangs"
    code = f"""if True:
        import multiprocessing, os, threading, time
        from colocate.prompts import Prompt
        from colocate.rewards import Answer, Workers
        workers = Workers(1, 100)
        hanging = Answer(Prompt([], "p", {{"answer": "hang"}}), "c", [])
        threading.Thread(target=workers, args=({reward!r}, [hanging])).start()
        time.sleep(0.2)
        print(multiprocessing.active_children()[0].pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=deadline(60))
    pid = int(done.stdout)
    assert eventually(lambda: not psutil.pid_exists(pid)), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# --rollout
# ---------------------------------------------------------------------------------------------------------------------

TURNS = """
def two(generate, prompts, task):
    first = generate([p.token_ids for p in prompts])
    second = generate([s["prompt"] + s["tokens"] for s in first], max_tokens=3)
    return [a | {"tokens": a["tokens"] + b["tokens"], "logprobs": a["logprobs"] + b["logprobs"], "mask": [1, 0]}
            for a, b in zip(first, second)]

def few(generate, prompts, task):
    return generate([prompts[0].token_ids])

def bare(generate, prompts, task):
    return [{"tokens": [1]} for _ in prompts]

def uneven(generate, prompts, task):
    return [s | {"mask": [1, 1]} for s in generate([p.token_ids for p in prompts])]

def silent(generate, prompts, task):
    return [s | {"tokens": [], "logprobs": []} for s in generate([p.token_ids for p in prompts])]

def raises(generate, prompts, task):
    return prompts.nothing
"""


def engine(calls: list[dict]):
    """Notes how it is asked, and says one token."""

    def generate(prompts: list[list[int]], **sampling) -> list[dict]:
        calls.append(sampling)
        return [{"prompt": p, "tokens": [5], "logprobs": [-1.0], "truncated": False} for p in prompts]

    return generate


def test_a_rollout_may_have_several_turns(model, file):
    it = task(model, rollout=file("turns.py", TURNS) + ":two", group_size=3, temperature=0.5)
    calls = []
    samples = it.rollout(engine(calls), it.prompts(0), seed=it.seed(0))
    asked = [p.token_ids for p in it.prompts(0) for _ in range(3)]
    assert [s["prompt"] for s in samples] == asked and samples[0]["tokens"] == [5, 5] and samples[0]["mask"] == [1, 0]
    first, second = calls
    assert "n" not in first and first["temperature"] == 0.5 and (first["max_tokens"], second["max_tokens"]) == (16, 3)
    assert first["seed"] != second["seed"], "each turn has noise of its own"
    assert len(it.rollout(engine(calls), it.prompts(0), n=1, temperature=0.0)) == 2
    assert calls[-1]["temperature"] == 0 and calls[-1]["seed"] is None
    plain = task(model, group_size=3)
    plain.rollout(engine(calls), plain.prompts(0), seed=7)
    assert calls[-1] == plain.sampling() | {"seed": 7}


@pytest.mark.parametrize(
    "name, says",
    [
        ("few", "turns.py:few returned no list of 4 samples, one of each prompt, but [{"),
        ("bare", "turns.py:bare returned a sample without logprobs, prompt, truncated for the prompt"),
        ("uneven", "turns.py:uneven returned a sample with 1 tokens, and logprobs or a mask of another length"),
        ("silent", "turns.py:silent returned a sample without a token"),
        (
            "raises",
            "turns.py:raises raised AttributeError: 'list' object has no attribute 'nothing' (turns.py, line 21)",
        ),
    ],
)
def test_what_is_wrong_with_a_rollout_is_named(name, says, model, file):
    it = task(model, rollout=file("turns.py", TURNS) + f":{name}", group_size=2)
    assert message(FAIL, it.rollout, engine([]), it.prompts(0)).startswith(f"rollout: {says}")


def test_a_rollout_that_is_not_there_is_refused(file):
    path = file("turns.py", TURNS)
    said = message(USAGE, check_task, Config(rollout=f"{path}:twoo"))
    assert f"--rollout {path}:twoo: turns.py has no function twoo" in said


def test_held_out_prompts_are_those_of_another_file(model, file):
    path = file("held.jsonl", "\n".join(map(json.dumps, ROWS)))
    it = task(model, eval_prompts=path)
    assert [p.text for p in it.held_out] == [row["prompt"] for row in ROWS] and it.prompts(0)[0].text == TEXTS[0]
    said = message(USAGE, check_task, Config(eval_prompts=path + "x"))
    assert said.startswith(f"--eval-prompts {path}x cannot be read")


def test_the_scripts_own_reward_is_looked_at_too(model):
    said = message(USAGE, Task, Config(), model, TEXTS, lambda completion: 1)
    assert "reward(completion) does not take a prompt and a completion" in said


@pytest.mark.parametrize("flag", ["--prompts", "--reward"])
def test_mistakes_are_one_line_before_anything_slow(flag):
    """Without a model being fetched: the one named here is nowhere."""
    command = [sys.executable, str(ROOT / "rlhf_colocate.py"), "--model", "no/such-model", flag, "nowhere.py:f"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(60))
    assert done.returncode == USAGE and done.stderr.startswith(f"rlhf_colocate.py: error: {flag} nowhere.py:f")
    assert len(done.stderr.strip().splitlines()) == 1
