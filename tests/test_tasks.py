"""Prompts and rewards: what a step asks, what text comes back, and one line for each mistake. No vLLM, no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, deadline

import rlhf_colocate as rc
from colocate.config import FAIL, USAGE, Config, Stop, check_loop
from colocate.memory import rehearsal_kv_bytes
from colocate.model_folder import Model
from colocate.tasks import Task, check_task, load_reward, multiples_of_8, read_prompts, token_prompts

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
    return Task(Config(**settings), model, TEXTS, length_of_both)


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
    assert it.reward(it.prompts(0)[0], [8, 16, 3, 5]) == 0.5 == multiples_of_8([8, 16, 3, 5])
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
    assert it.reward(it.prompts(0)[0], tokens) == len(it.prompts(0)[0].text) + len(it.text(tokens))


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
    it = task(model, prompts=path, prompts_per_step=3)
    assert [p.text for p in it.prompts(0)] == ["1 + 1 =", "tea\n", "1 + 1 ="]
    assert it.prompts(0)[1].row == {"prompt": "tea\n", "answer": 3}
    assert len(it.proof_prompts()) == 2


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "q.jsonl is empty"),
        ("\n \n", "q.jsonl is empty"),
        ('{"prompt": "a"}\n\n{"prompt": }', "line 3 is no JSON in UTF-8 (Expecting value)"),
        ('{"prompt": "a"}\n["b"]', "line 2 is no JSON object"),
        ('{"question": "a"}', 'line 1 has no "prompt" that is a string'),
        ('{"prompt": ["a"]}', 'line 1 has no "prompt" that is a string'),
        (b'{"prompt": "\xff"}', "line 1 is no JSON in UTF-8"),
        ('{"prompt": "\\ud83e"}', "line 1 is no JSON in UTF-8"),
        ("[" * 100_000, "line 1 is no JSON in UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(content, says, file):
    config = Config(prompts=file("q.jsonl", content))
    assert says in (said := message(USAGE, check_task, config)) and 'like {"prompt": "1 + 1 ="' in said


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "q.jsonl cannot be read: No such file" in message(USAGE, read_prompts, str(tmp_path / "q.jsonl"))
    assert "cannot be read: Is a directory" in message(USAGE, read_prompts, str(tmp_path))


def test_prompts_may_come_by_a_pipe(model):
    """It can be read once only, and is read before the model is known."""
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "tea"}\n')
    os.close(writer)
    config = Config(prompts=f"/dev/fd/{reader}")
    check_task(config)
    os.close(reader)
    assert [p.text for p in Task(config, model, TEXTS, length_of_both).prompts(0)] == ["tea"] * 8


def test_a_prompt_that_is_too_long_is_refused_by_its_line(model, file):
    rows = [{"prompt": "tea"}, {"prompt": "🫖" * 30}, {"prompt": "🫖" * 20}]
    path = file("q.jsonl", "\n".join(map(json.dumps, rows)))
    whole = {"prompts": path, "max_tokens": 16, "max_model_len": 512}
    longest = len(task(model, **whole).prompts(0)[1].token_ids)
    task(model, **whole | {"max_model_len": longest + 16})
    config = Config(**whole | {"max_model_len": longest + 15})
    said = message(USAGE, Task, config, model, TEXTS, length_of_both)
    assert f"q.jsonl, line 2 is a prompt of {longest} tokens; --max-model-len {longest + 15} leaves" in said
    assert said.endswith(f"Try: --max-model-len {longest + 16}")


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
    said = message(USAGE, Task, Config(prompts=prompts, reward=reward), bare, TEXTS, length_of_both)
    assert said.startswith("--prompts and --reward: text needs a tokenizer, and the default model here has none")


# ---------------------------------------------------------------------------------------------------------------------
# --reward
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reward_of_a_file_replaces_the_scripts(model, file):
    file("neighbour.py", "WORTH = 2")
    code = "from neighbour import WORTH\ndef mine(prompt, completion): return WORTH * (completion.strip() == 'tea')"
    it = task(model, reward=file("mine.py", code) + ":mine")
    tea, water = (it.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("tea", "water"))
    assert [it.reward(it.prompts(0)[0], tokens) for tokens in (tea, water)] == [2, 0]


@pytest.mark.parametrize("signature", ["prompt, completion, row", "p, c, *, row=None", "p, c, **row"])
def test_a_reward_gets_the_prompts_row_if_it_takes_it(signature, model, file):
    rows = file("q.jsonl", '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": 7}')
    answer = "row['row']['answer']" if "**" in signature else "row['answer']"
    it = task(model, prompts=rows, reward=file("mine.py", f"def f({signature}): return {answer}") + ":f")
    assert [it.reward(prompt, [5]) for prompt in it.prompts(0)[:2]] == [5, 7]


@pytest.mark.parametrize("value", ["True", "3", "__import__('numpy').float32(2.5)", "__import__('torch').tensor(0.5)"])
def test_numbers_of_all_kinds_are_rewards(value, model, file):
    it = task(model, reward=file("mine.py", f"def f(p, c): return {value}") + ":f")
    assert it.reward(it.prompts(0)[0], [5]) == float(eval(value))


@pytest.mark.parametrize(
    "value", ["None", "'1'", "float('nan')", "float('inf')", "10**400", "[1.0]", "__import__('torch').ones(2)"]
)
def test_a_reward_must_be_a_finite_number(value, model, file):
    it = task(model, reward=file("mine.py", f"def f(p, c): return {value}") + ":f")
    said = message(FAIL, it.reward, it.prompts(0)[0], [5])
    assert said.startswith(f"reward: mine.py:f returned {repr(eval(value))[:90]}")
    assert said.endswith("for the prompt 'The capital of France is'. It must return a finite number")


def test_a_reward_that_raises_is_named_with_its_line_and_prompt(model, file, capsys):
    code = "import json\n\ndef f(prompt, completion):\n    return helper(completion)\n\n"
    code += "def helper(text):\n    return json.loads('no')\n"
    it = task(model, reward=file("mine.py", code) + ":f", verbose=True)
    said = message(FAIL, it.reward, it.prompts(0)[0], [5])
    assert said.startswith(
        "reward: mine.py:f raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) (mine.py, "
    )
    assert said.endswith("line 7) for the prompt 'The capital of France is'")
    assert "return json.loads('no')" in capsys.readouterr().err, "--verbose shows the traceback"
    own = Task(Config(), model, TEXTS, lambda prompt, completion: prompt / 2)
    said = message(FAIL, own.reward, own.prompts(0)[0], [5])
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
    assert says in message(USAGE, check_task, Config(reward=f"{path}:{name}"))


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
