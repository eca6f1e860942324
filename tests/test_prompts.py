"""Prompts out of every kind of file, what is wrong with files, and the order in which prompts are drawn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import done, refused

from dmdtrain.config import ConfigError
from dmdtrain.data import prompt_files
from dmdtrain.data.buckets import OtherItems
from dmdtrain.data.prompts import EpochSampler, load_prompts, read_prompts, split

PROMPTS = [
    "a red cat runs",
    'a "quoted", dog; sleeps\there',
    "一只红色的狐狸",
    "قطة حمراء تجري",
    "café e\u0301 👩\u200d🚀",
]
WANTED = [PROMPTS[0], 'a "quoted", dog; sleeps here', *PROMPTS[2:]]


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def load(path, column: str | None = None) -> list[str]:
    return load_prompts(str(path), "data.prompts", held_out=False, column=column)


def refusal(path, column: str | None = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        load(path, column)
    message = str(error.value)
    assert message.startswith(f"data.prompts: {path}: ") or "no prompts" in message, message
    assert "\n" not in message
    return message


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


# ---------------------------------------------------------------------------------------------------- what is read


def test_every_kind_of_file_gives_the_same_prompts(write, tmp_path):
    rows = [{"id": i, "Caption": prompt} for i, prompt in enumerate(PROMPTS)]
    table = pyarrow.table({"id": list(range(len(PROMPTS))), "Caption": PROMPTS})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    encoded = table.set_column(1, "Caption", table["Caption"].dictionary_encode())
    pyarrow.parquet.write_table(encoded, tmp_path / "encoded.parquet")
    views = table.set_column(1, "Caption", table["Caption"].cast(pyarrow.string_view()))
    pyarrow.parquet.write_table(views, tmp_path / "views.parquet")
    files = [
        write("p.txt", "\n".join(PROMPTS)),
        write("noname", "\n".join(PROMPTS) + "\n"),
        write("strings.json", json.dumps(PROMPTS)),
        write("objects.json", json.dumps(rows, ensure_ascii=False)),
        write("library.json", json.dumps({f"name {i}": prompt for i, prompt in enumerate(PROMPTS)})),
        write("strings.jsonl", "\n".join(json.dumps(prompt) for prompt in PROMPTS)),
        write("objects.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"),
        write("p.csv", "id,Caption\n" + "\n".join(f"{i},{quoted(prompt)}" for i, prompt in enumerate(PROMPTS))),
        write("p.TSV", "id\tCaption\n" + "\n".join(f"{i}\t{quoted(prompt)}" for i, prompt in enumerate(PROMPTS))),
        tmp_path / "p.parquet",
        tmp_path / "encoded.parquet",
        tmp_path / "views.parquet",
        write("named.json", json.dumps({"prompts": PROMPTS})),
    ]
    for file in files:
        assert load(file) == WANTED, file.name


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_byte_order_marks_and_line_ends(write, suffix, mark, end):
    quote = {"jsonl": json.dumps, "json": json.dumps}.get(suffix, str)
    lines = [quote(prompt) for prompt in ("a cat", "a dog")]
    if suffix == "json":
        text = f"[{end}{lines[0]},{end}{lines[1]}{end}]{end}"
    else:
        text = "".join(line + end for line in [*(["prompt"] if suffix in ("csv", "tsv") else []), *lines])
    assert load(write(f"p.{suffix}", mark + text)) == ["a cat", "a dog"]


def test_a_line_ends_at_line_ends_alone(write):
    """Not at the other separators of Unicode, of which text from the web has some."""
    text = "a\u2028cat\x0con\x85a \x1cmat\na\x00 dog\n"
    with pytest.raises(ConfigError, match="binary"):
        load(write("p.txt", text))
    assert load(write("p.txt", text.replace("\0", ""))) == ["a cat on a mat", "a dog"]
    assert load(write("old.txt", "a cat\ra dog")) == ["a cat", "a dog"]
    assert load(write("p.csv", 'prompt\n"a cat\non two lines"\n')) == ["a cat on two lines"]


def test_control_characters_go_and_marks_of_direction_stay(write):
    texts = ["a \x1b[1mcat\x07", "\u200fقطة\u200c حمراء\u200e", "half a pair \ud83d here", "a\tb\u00a0c"]
    wanted = ["a [1mcat", "\u200fقطة\u200c حمراء\u200e", "half a pair here", "a b c"]
    assert load(write("p.json", json.dumps(texts))) == wanted
    assert load_prompts(texts, "validation.prompts", held_out=True) == wanted


def test_blanks_and_duplicates_are_counted(write):
    read = read_prompts(str(write("p.txt", "a dog\n\na  dog \na cat\n \t\na dog\n")), "data.prompts", held_out=False)
    assert (read.texts, read.blank, read.duplicates) == (["a dog", "a cat"], 2, 2)
    assert read.left_out == "2 duplicates and 2 blank left out of 6"
    rows = '{"prompt": null}\n{"prompt": ""}\n{"prompt": "a cat"}\n{"prompt": "a cat"}'
    read = read_prompts(str(write("p.jsonl", rows)), "data.prompts", held_out=False)
    assert (read.texts, read.left_out) == (["a cat"], "1 duplicate and 2 blank left out of 4")
    assert read_prompts(["a", "b"], "x", held_out=False).left_out == ""


def test_long_prompts_are_kept_whole(write):
    long = " ".join(["word"] * 2000)
    assert load(write("p.txt", f"{long}\na cat\n")) == [long, "a cat"]
    assert load(write("p.csv", f"prompt\n{long * 9}\n")) == [long * 9]  # beyond what csv takes by itself


# ---------------------------------------------------------------------------------------------------- columns


def test_the_column_is_found_or_named(write, tmp_path):
    table = write("p.csv", "id,text,prompt,other\n1,t,p,o\n")
    assert load(table) == ["p"]
    assert load(table, "text") == ["t"] and load(table, "other") == ["o"]
    assert load(write("t.csv", "id, Text\n1,t\n")) == ["t"]
    assert load(write("only.csv", "description\na cat\n")) == ["a cat"]
    assert load(write("only.csv", "cats\na cat\n"), "cats") == ["a cat"]
    assert load(write("only.csv", "my words\na cat\n"), "my words") == ["a cat"]
    assert load(write("p.jsonl", '{"a": "x", "b": "y"}'), "b") == ["y"]
    assert load(write("p.json", '[{"a": "x", "b": "y"}]'), "a") == ["x"]
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", None], "b": ["y", "z"]}), tmp_path / "p.parquet")
    assert load(tmp_path / "p.parquet", "a") == ["x"] and load(tmp_path / "p.parquet", "b") == ["y", "z"]
    assert load(write("p.txt", "a cat"), "caption") == ["a cat"]  # text has no columns


def test_columns_that_can_not_be_chosen(write, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), tmp_path / "p.parquet")
    files = [
        write("p.csv", "a,b\nx,y\n"),
        write("p.tsv", "a\tb\nx\ty\n"),
        write("p.jsonl", '{"a": "x", "b": "y"}'),
        write("p.json", '[{"a": "x", "b": "y"}]'),
        tmp_path / "p.parquet",
    ]
    for file in files:
        assert "which column holds the prompts? It has a, b; name it in data.prompt_column" in refusal(file)
        assert "there is no column 'c'; it has a, b (data.prompt_column)" in refusal(file, "c")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "no prompts in it"),
        ("p.txt", "\n \n", "no prompts in it"),
        ("p.csv", "", "no prompts in it"),
        ("p.csv", "prompt\n", "no prompts in it"),
        ("p.json", "[]", "no prompts in it"),
        ("p.jsonl", "", "no prompts in it"),
        ("p.txt", "a cat\na d\udcffg", "cannot be read as text: line 2 is not UTF-8"),
        ("p.txt", "a cat".encode("utf-16"), "cannot be read as text: it is UTF-16; save it as UTF-8"),
        ("p.txt", b"\x7fELF\0\0", "it is binary"),
        ("p.yaml", "- a cat", ".yaml is no known kind of file; valid are .txt, .jsonl, .json, .csv, .tsv, .parquet"),
        ("p.json", "{", "not valid JSON: "),
        ("p.json", "", "not valid JSON: "),
        ("p.json", "[" * 100_000, "not valid JSON"),
        ("p.json", "5", "it must hold a list of prompts, a list of objects, or an object of names and prompts"),
        ("p.json", '["a cat", 5]', "entry 2 is no text but 5"),
        ("p.json", '{"a": ["a cat"], "b": "a dog"}', "'a' is no text but [\"a cat\"]"),
        ("p.json", '{"a": "a cat", "a": "a dog"}', "not valid JSON: 'a' stands twice"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": "a", "prompt": "b"}', "line 2: not valid JSON: 'prompt' stands twice"),
        (
            "p.csv",
            "cat\ndog\nbird\n",
            "is its first line, 'cat', a prompt or the name of the column? Put `prompt` above",
        ),
        ("p.txt", "\u200b\n\ufeff\n", "no prompts in it"),
        ("p.json", '[{"prompt": "a"}, {"text": "b"}]', "entry 2 has no 'prompt'; it has text"),
        ("p.json", '[{"prompt": ["a"]}]', "entry 1: 'prompt' is no text but [\"a\"]"),
        ("p.jsonl", '"a"\n\n{"x"', "line 3: not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"caption": "b"}', "line 2 has no 'prompt'; it has caption"),
        ("p.jsonl", "a cat\n", "line 1: not valid JSON"),
        ("p.csv", "id,prompt\n1,a cat, a dog\n", "line 2 has 3 columns, the first line 2; put prompts with"),
        ("p.csv", "id,prompt\n1\n", "line 2 has 1 columns, the first line 2"),
        ("p.csv", 'id,prompt\n0,"a\ncat"\n1,"a\ndog",x\n', "line 4 has 3 columns, the first line 2"),
        (
            "p.csv",
            'id,prompt\n1,a cat\n2,"a 12 inch record\n3,a dog\n4,"a fox, running"\n',
            "line 3: ',' expected after '\"'; a quote in it is not closed before line 5",
        ),
        (
            "p.csv",
            'file_name,text\na.mp4,"a cat\nb.mp4,a dog"\n',
            "line 2: its quotes take in line 3, which names another clip",
        ),
        (
            "p.tsv",
            'a.mp4\ttext\nb.MP4\t"a cat\nc.mp4\ta dog"\n',
            "line 2: its quotes take in line 3, which names another",
        ),
        ("p.csv", 'id,prompt\n1,"a cat\n', "line 2: unexpected end of data"),
        (
            "p.csv",
            "a red cat runs\na dog\n",
            "first line must name the columns, with commas between them; it is 'a red",
        ),
        ("p.csv", "id;prompt\n1;a cat\n", "first line must name the columns, with commas between them; it is 'id;p"),
        ("p.tsv", "id,prompt\n1,a cat\n", "first line must name the columns, with tabs between them; it is 'id,p"),
        ("p.parquet", "not parquet at all", "not valid parquet"),
        ("p.parquet", "", "not valid parquet"),
    ],
)
def test_files_that_are_refused(write, name, content, says):
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    assert says in refusal(write(name, data))


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert "it is a folder; valid is a file: .txt" in refusal(tmp_path / "folder.txt")
    assert "no such file; valid are .txt" in refusal(tmp_path / "none.txt")
    assert "it is no regular file" in refusal("/dev/zero")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert "no such file" in refusal(tmp_path / "loop.txt")
    assert "cannot be read: File name too long" in refusal(tmp_path / ("a" * 300 + ".txt"))


def test_what_is_too_large(write, tmp_path):
    with (tmp_path / "huge.txt").open("wb") as file:
        os.truncate(file.fileno(), 3 << 30)  # takes no space
    assert "3.0 GiB; a file of prompts has at most 2 GiB" in refusal(tmp_path / "huge.txt")
    assert "prompt 2 has 100,001 characters; at most 100,000 are valid" in refusal(
        write("p.txt", "a cat\n" + "x" * 100_001)
    )


def test_parquet_columns_that_hold_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [1, 2]}), tmp_path / "p.parquet")
    assert "column 'prompt' is no text but int64" in refusal(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [["a"], ["b"]]}), tmp_path / "p.parquet")
    assert "column 'prompt' is no text but list" in refusal(tmp_path / "p.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    assert "pip install 'dmdtrain[parquet]'" in refusal(tmp_path / "p.parquet")


def test_a_table_larger_than_a_batch(tmp_path):
    prompts = [f"prompt {i}" for i in range(70_000)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / "p.parquet", row_group_size=30_000)
    assert load(tmp_path / "p.parquet") == prompts


def test_pipes_are_read():
    """As `--prompts <(head -n 5 prompts.txt)` makes them."""
    read, written = os.pipe()
    os.write(written, b"a cat\na dog\n")
    os.close(written)
    assert prompt_files.read_file(Path(f"/dev/fd/{read}"), None) == ["a cat", "a dog"]
    os.close(read)


# ---------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("drawn", [0, 1, 6, 7, 8, 20])
def test_a_sampler_resumes_in_mid_epoch(drawn):
    items = [f"prompt {i}" for i in range(7)]
    sampler = EpochSampler(items, 3)
    before = sampler.draw(drawn) if drawn else []
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    after = [*sampler.draw(3), *sampler.draw(16), *sampler.draw(1)]
    resumed = EpochSampler(items, 99)
    resumed.draw(2)
    resumed.load_state_dict(state)
    assert [*resumed.draw(1), *resumed.draw(19)] == after
    whole = before + after
    for epoch in range(len(whole) // 7):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == items
    assert whole[:7] != whole[7:14]


def test_processes_take_the_parts_of_one_draw_and_share_a_state():
    items = [f"prompt {i}" for i in range(7)]
    whole, ranks = EpochSampler(items, 3), [EpochSampler(items, 3, rank, 3) for rank in range(3)]
    for n in (1, 2, 4, 1):
        assert [item for rank in ranks for item in rank.draw(n)] == whole.draw(3 * n)
    states = [sampler.state_dict() for sampler in (whole, *ranks)]
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_a_state_of_64_bit_order_and_without_a_checksum_is_read():
    """As checkpoints held it before."""
    sampler = EpochSampler(list("abcde"), 1)
    sampler.draw(2)
    state = sampler.state_dict()
    old = {"generator": state["generator"], "count": state["count"], "order": state["order"].to(torch.int64)}
    resumed = EpochSampler(list("abcde"), 0)
    resumed.load_state_dict(old)
    assert resumed.draw(13) == sampler.draw(13)


def test_other_items_than_before_are_refused(tmp_path):
    state = EpochSampler(["a", "b", "c"], 0).state_dict()
    with pytest.raises(OtherItems, match="2 items now, 3 when the checkpoint was saved"):
        EpochSampler(["a", "b"], 0).load_state_dict(state)
    for others in (["a", "b", "d"], ["a", "c", "b"]):
        with pytest.raises(OtherItems, match="not the same, or not in the same order"):
            EpochSampler(others, 0).load_state_dict(state)
    files = EpochSampler([tmp_path / "a", tmp_path / "b"], 0).state_dict()  # files may have moved
    EpochSampler([tmp_path / "new" / "a", tmp_path / "new" / "b"], 0).load_state_dict(files)


def test_edited_prompts_are_told_of_and_not_taken_for_a_damaged_checkpoint(settings, tmp_path):
    settings["validation"]["every"] = 0
    prompts, file = tmp_path / "prompts.txt", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    done("fit", file, "--max-steps", 2)
    before = prompts.read_text()
    resumed = ("fit", file, "--max-steps", 4)
    prompts.write_text(before.replace("a blue dog sleeps", "a blue dog runs"))
    refused(*resumed, says=["data.prompts: they are not the same", "an exact resume needs the same prompts"])
    prompts.write_text(before + "a cat\n")
    refused(*resumed, says=["data.prompts: 5 items now, 4 when", "an exact resume needs the same prompts"])
    prompts.write_text(before)
    assert "resumed from" in done(*resumed)


def test_held_out_prompts_are_chosen_by_their_content():
    prompts = [f"prompt {number}" for number in range(100)]
    trained, kept = split(prompts, 10)
    assert len(kept) == 10 and trained == [prompt for prompt in prompts if prompt not in kept]
    assert split(prompts[::-1], 10)[1] == kept
    assert len(set(kept) & set(split([*prompts, "one", "more"], 10)[1])) >= 8
    assert split(prompts, 0) == (prompts, [])


def test_prompts_are_kept_from_training_and_rendered(settings, tmp_path):
    """Those of validation.prompts that are trained on are told of."""
    settings["train"]["max_steps"] = 2
    file, run = tmp_path / "run.yaml", tmp_path / "run"

    def write(**validation: object) -> Path:
        values = settings | {"validation": settings["validation"] | {"every": 2, "count": 1} | validation}
        file.write_text(yaml.safe_dump(values))
        return file

    assert "trained on too" not in done("fit", write(), "--dry-run")
    said = done("fit", write(prompts=["a dog", "a cat"], count=2), "--dry-run")
    assert "prompts 4 for training, 2 for validation" in said and "1 of those for validation are trained on too" in said
    said = done("fit", write(held_out_prompts=2))
    assert "prompts 2 for training, 3 for validation" in said and "trained on too" not in said
    _, kept = split(load(tmp_path / "prompts.txt"), 2)
    assert json.loads((run / "samples" / "step-000002" / "results.json").read_text())["prompts"] == ["a red dog", *kept]
    refused("fit", write(held_out_prompts=1), "--max-steps", 4, says="validation.held_out_prompts: 2 -> 1")
    refused("fit", write(held_out_prompts=4), says=["held_out_prompts: 4: none of 4 prompts", "valid are 0 to 3"])
    refused(
        "fit", write(held_out_prompts=1, every=0), says="held_out_prompts: 1 needs validation; validation.every is 0"
    )
    done("prepare", write(held_out_prompts=2))


def test_the_state_of_many_prompts_is_small():
    sampler = EpochSampler([f"prompt {i}" for i in range(100_000)], 0)
    sampler.draw(4)
    assert sum(value.nbytes for value in sampler.state_dict().values()) < 500_000
