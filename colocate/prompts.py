"""The rows of --prompts and --eval-prompts: JSON lines are read here, all else by the library `datasets`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

from colocate.config import MISSING, USAGE, Stop, refuse_unless
from colocate.report import short

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # file's ending: datasets' builder
WHOLE = "train"  # the split that a file without splits is


@dataclasses.dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None  # as the model sees it; None for a model without a tokenizer
    row: dict = dataclasses.field(default_factory=dict)  # of --prompts; {"prompt": text} for the script's own
    messages: list[dict] | None = None  # of a chat, whose template has made the text


@functools.cache  # a pipe can be read once
def read_prompts(path: str, column: str = "prompt", split: str = WHOLE, flag: str = "--prompts") -> dict[str, dict]:
    """{place in the file: row}. A row has a prompt in this column, and whatever else stands there.

    path: a file of JSON lines (blank ones do not count), which may be a pipe; or a .json, .csv or .parquet file or a
    folder that datasets.load_dataset takes. A prompt is a string, or a list of chat messages. Raises Stop(USAGE) for
    what is none of this, and Stop(MISSING) where `datasets` is needed and not installed.
    """
    file = Path(path).expanduser()
    kind = KINDS.get(file.suffix)
    lines = not file.is_dir() and (kind is None or (file.suffix == ".jsonl" and split == WHOLE))
    rows = json_lines(file, f"{flag} {path}", column) if lines else by_datasets(file, kind, split, f"{flag} {path}")
    hint = hint_of(column) if lines else f"Give a file with a column {column}"
    refuse_unless(bool(rows), f"{flag} {path} is empty. {hint}")
    for place, row in rows.items():
        found = f"{place} has no {json.dumps(column)} that is a string or a list of chat messages"
        others = [name for name in row if name != column]
        fix = hint
        if others and row.get(column) is None:
            fix = f"It has {', '.join(others)}. Try: --prompt-column {others[0]}"
        refuse_unless(is_prompt(row.get(column)), f"{found}. {fix}")
    return rows


def hint_of(column: str) -> str:
    return f'Each line must be a JSON object like {{"{column}": "1 + 1 =", "answer": "2"}}'


def is_prompt(value: object) -> bool:
    """Whether it is text, or a list of {"role": text, "content": text}."""
    if isinstance(value, str):
        return True
    messages = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    return bool(messages) and all(isinstance(m.get(key), str) for m in value for key in ("role", "content"))


def json_lines(file: Path, name: str, column: str) -> dict[str, dict]:
    """The rows of a file with one JSON object a line. name: for messages."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        message = f"{name} cannot be read: {error.strerror}. Give another file. {hint_of(column)}"
        raise Stop(message, USAGE) from None
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no tokenizer takes it
        except (ValueError, RecursionError) as error:
            message = f"{place} is no JSON in UTF-8 ({getattr(error, 'msg', error)}). {hint_of(column)}"
            raise Stop(message, USAGE) from None
        refuse_unless(isinstance(row, dict), f"{place} is no JSON object. {hint_of(column)}")
        rows[place] = row
    return rows


def by_datasets(file: Path, kind: str | None, split: str, name: str) -> dict[str, dict]:
    """The rows that the library `datasets` finds: in a file of this kind, or in a folder."""
    refuse_unless(file.exists(), f"{name} cannot be read: No such file or directory. Give another file")
    found = importlib.util.find_spec("datasets")
    message = f"{name} is read by the library datasets, which is not installed. Try: pip install datasets"
    refuse_unless(bool(found and found.origin), message, MISSING)  # a mere folder of that name has no origin
    if file.is_file() and not file.stat().st_size:
        return {}
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=str(file), split=split)
        elif (file / "state.json").is_file() or (file / "dataset_dict.json").is_file():  # of save_to_disk
            rows = datasets.load_from_disk(str(file))
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(str(file), split=split)
    except Exception as error:  # of many kinds, of pyarrow and pandas as well
        cause = error.__cause__ or error
        message = f"{name} cannot be read ({type(cause).__name__}: {short(cause)}). Check the file, --split {split}"
        raise Stop(message, USAGE) from None
    return {f"{name}, row {number}": row for number, row in enumerate(rows)}
