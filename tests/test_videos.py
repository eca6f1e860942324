"""Data sets of clips: layouts, what is wrong with real ones, buckets, and the order of draws."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from clip_files import LOSSLESS, scene, write_clip
from conftest import refused
from PIL import Image
from rich.console import Console

from dmdtrain.config import ConfigError, VideoSet, build
from dmdtrain.data.buckets import BucketSampler, Stream, bucket_size, streams_of
from dmdtrain.data.decode import read_clip, read_header
from dmdtrain.data.videos import list_clips
from dmdtrain.train import clips as run_clips
from dmdtrain.train import setup
from dmdtrain.train.clips import scan
from dmdtrain.train.prepare_videos import prepare_videos

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)


@pytest.fixture
def resolve(settings, tmp_path):
    """A run of 5-frame clips on tmp_path / clips, with {"group.key": value} applied."""

    def run(changes: dict | None = None) -> setup.Run:
        values = settings | {"dmd": {"real_data_loss_weight": 0.5}, "rollout": {"num_training_frames": 2}}
        values["data"] = values["data"] | {"videos": str(tmp_path / "clips")}
        for key, value in (changes or {}).items():
            group, name = key.split(".")
            values[group] = values.get(group, {}) | {name: value}
        return setup.resolve(build(values))

    return run


@pytest.fixture
def clips(tmp_path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A clip of 6 frames that is as it should be."""
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", 6)


def put(good: Path, folder: Path, name: str = "good", caption: str | bytes | None = "a red cat runs") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.mp4"
    shutil.copy(good, file)
    if caption is not None:
        file.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return file


def listed(path: Path, **options) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by file name, and reasons by what was dropped."""
    found, dropped = list_clips(VideoSet(path=str(path), **options), "data.videos.0")
    return {clip.file.name: clip.caption for clip in found}, {item.where: item.reason for item in dropped}


# ---------------------------------------------------------------------------------------------------- layouts


def test_captions_beside_clips_at_any_depth(good, clips, tmp_path):
    put(good, clips, "b", "\ufeffa  dog\r\n\r\n sleeps\t")
    put(good, clips / "deep" / "er", "a", "a cat")
    put(good, clips / "日本 語", "été🎬", "雪の中の狐")
    put(good, clips / ".hidden", "x")
    put(good, clips, ".partial", "x")
    put(good, tmp_path / "elsewhere", "linked", "a link")
    (clips / "link").symlink_to(tmp_path / "elsewhere")
    (clips / "deep" / "loop").symlink_to(clips)
    (clips / "again").symlink_to(clips / "deep")
    (clips / "notes.md").write_text("no clip")
    put(good, clips, "none", None)
    found, dropped = listed(clips)
    assert found == {"b.mp4": "a dog sleeps", "a.mp4": "a cat", "été🎬.mp4": "雪の中の狐", "linked.mp4": "a link"}
    assert dropped == {str(clips / "none.mp4"): "it has no caption (none.txt)"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_files(clips, kind, column):
    rows = [("a.mp4", 'a "red", cat\nruns'), ("sub/b.webm", "雪"), ("c.mov", "x")]
    with (clips / f"metadata.{kind}").open("w", encoding="utf-8-sig", newline="") as handle:
        if kind == "csv":
            csv.writer(handle).writerows([("id", "file_name", column), *((0, *row) for row in rows)])
        else:
            handle.writelines(json.dumps({"id": 0, "file_name": n, column: t}) + "\r\n\n" for n, t in rows)
    wanted = {"a.mp4": 'a "red", cat runs', "b.webm": "雪", "c.mov": "x"}
    assert listed(clips) == listed(clips / f"metadata.{kind}") == (wanted, {})
    assert listed(clips, caption_column=column) == (wanted, {})
    with pytest.raises(ConfigError) as caught:
        listed(clips, caption_column="words")
    assert str(caught.value) == (
        f"data.videos.0.caption_column: {clips / f'metadata.{kind}'} has no column words; its columns: "
        f"{', '.join(sorted(['id', 'file_name', column]))}"
    )


def test_a_chosen_caption_column_comes_before_the_usual_ones(clips):
    (clips / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "short", "long": "long one"}\n')
    assert listed(clips)[0] == {"a.mp4": "short"}
    assert listed(clips, caption_column="long")[0] == {"a.mp4": "long one"}


OUT = "its file_name leads out of the folder"
LINES = {
    '{"file_name": "../x.mp4", "text": "x"}': f"{OUT}: ../x.mp4",
    '{"file_name": "a/../../x.mp4", "text": "x"}': OUT,
    '{"file_name": "/etc/x.mp4", "text": "x"}': OUT,
    '{"file_name": "a\\u0000.mp4", "text": "x"}': "its file_name is binary",
    '{"file_name": "", "text": "x"}': "it has no file_name",
    '{"file_name": 3, "text": "x"}': "it has no file_name",
    '{"text": "x"}': "it has no file_name",
    '{"file_name": "passwd", "text": "x"}': "neither a video nor an image: passwd",
    '{"file_name": "http://host/x.html", "text": "x"}': "neither a video nor an image",
    '{"file_name": "a.mp4"}': "it has no caption",
    '{"file_name": "a.mp4", "text": null}': "it has no caption",
    '{"file_name": "a.mp4", "text": ["x"]}': "its caption is no text: ['x']",
    '{"file_name": "a.mp4", "text": " \\n"}': "its caption is empty",
    '{"file_name": "a.mp4", "text": "\\u0000"}': "its caption is binary",
    '{"file_name": "a.mp4", "text": "\\ud800"}': "its caption is no UTF-8 text",
    '{"file_name": "a.mp4", "text": "x"': "it is no JSON object",
    '["a.mp4", "x"]': "it is no JSON object",
    "[" * 20000: "it is no JSON object",
}


def test_a_bad_line_of_a_table_is_left_out_alone(clips):
    head, long = b"\xef\xbb\xbfID, File_Name ,Text\n", b"word " * 30_000
    rows = [
        b"1,good.mp4,x\n",
        b'2,a.mp4,"a" b"\n',
        b"3,b.mp4,un \xe9t\xe9\n",
        b"4,c.mp4," + long + b"\n",
        b"5,d.mp4,y\n",
    ]
    (clips / "metadata.csv").write_bytes(head + b"".join(rows) + b'6,e.mp4,"open\n')
    found, dropped = listed(clips)
    assert found == {"good.mp4": "x", "d.mp4": "y"}
    assert list(dropped.values()) == [
        "it can not be read: ',' expected after '\"'",
        "its caption is no UTF-8 text",
        "its caption has 150000 bytes; at most 100000 are read",
        "it can not be read: unexpected end of data",
    ]
    (clips / "metadata.csv").unlink()
    lines = [b'{"File_Name": "good.mp4", "Caption": "x"}', b'{"file_name": "b.mp4", "text": "\xe9"}']
    long_one = json.dumps({"file_name": "c.mp4", "text": long.decode()}).encode()
    (clips / "metadata.jsonl").write_bytes(b"\n".join([*lines, long_one]))
    found, dropped = listed(clips)
    assert found == {"good.mp4": "x"}
    assert list(dropped.values()) == ["it is no UTF-8 text", "its caption has 150000 bytes; at most 100000 are read"]


def test_captions_are_cleaned_as_prompts_are(good, clips):
    put(good, clips, "a", "a\x1b[31m red\x07 cat")
    put(good, clips, "b", "\u200b\u200d \ufeff")
    put(good, clips, "c", "\u202b雪\u200d狐\u202c")
    found, dropped = listed(clips)
    assert found == {"a.mp4": "a [31m red cat", "c.mp4": "\u202b雪\u200d狐\u202c"}
    assert list(dropped.values()) == ["its caption is empty"]


def test_the_layout_of_the_hub(good, clips, tmp_path):
    """Metadata in folders below, each of its own; captions beside the clips of the others; parquet as well."""
    put(good, clips / "train" / "deep", "a", None)
    (clips / "train" / "metadata.jsonl").write_text('{"file_name": "deep/a.mp4", "text": "of train"}')
    put(good, clips / "train" / "deep", "unlisted", "x")
    table = pyarrow.table({"file_name": ["b.mp4", "c.mp4"], "caption": ["of test", None], "extra": [1, 2]})
    (clips / "test").mkdir()
    pyarrow.parquet.write_table(table, clips / "test" / "metadata.parquet")
    put(good, clips / "others", "d", "beside")
    found, dropped = listed(clips)
    assert found == {"a.mp4": "of train", "b.mp4": "of test", "d.mp4": "beside"}
    assert list(dropped.values()) == ["it has no caption"]
    pairs, _ = list_clips(VideoSet(path=str(clips)), "data.videos.0")
    assert clips / "train" / "deep" / "a.mp4" in [clip.file for clip in pairs]
    assert listed(clips / "test" / "metadata.parquet")[0] == {"b.mp4": "of test"}
    (clips / "train" / "captions.JSONL").write_text('{"file_name": "deep/a.mp4", "text": "of another name"}')
    assert listed(clips / "train" / "captions.JSONL")[0] == {"a.mp4": "of another name"}


def test_csv_lines_of_the_wrong_length(clips):
    (clips / "metadata.csv").write_text("file_name,text\ngood.mp4,x\na.mp4,x,y\nb.mp4\nc.mp4,a cat\nruns\n")
    found, dropped = listed(clips)
    assert found == {"good.mp4": "x", "c.mp4": "a cat"}
    assert dropped == {
        f"{clips / 'metadata.csv'}, line 3": "it has more fields than the first line; captions with commas in them need "
        "double quotes",
        f"{clips / 'metadata.csv'}, line 4": "it has fewer fields than the first line",
        f"{clips / 'metadata.csv'}, line 6": "it has fewer fields than the first line; if it is the rest of a caption, that "
        "needs double quotes",
    }


# A table, what is read of it, and the lines that are told; {}: which line the first of them is said to go on to.
STRAY_QUOTES = {
    "an error far below": (
        'file_name,text\nc1.mp4,a red ball\nc2.mp4,"a 12 inch record\nc3.mp4,x\nc4.mp4,y\nc5.mp4,"a dog, running"\nc6.mp4,z\n',
        {"c1.mp4": "a red ball", "c6.mp4": "z"},
        [3, 4, 5, 6],
        "it can not be read: ',' expected after '\"'; a quote in it is not closed before line 6",
    ),
    "open to the end": (
        'file_name,text\nc1.mp4,x\nc2.mp4,"y\nc3.mp4,z\n\nc4.mp4,z\n',
        {"c1.mp4": "x"},
        [3, 4, 6],
        "it can not be read: unexpected end of data; a quote in it is not closed before line 6",
    ),
    "two captions in one": (
        'file_name,text\r\nc1.mp4,"a red ball\r\nc2.mp4,a blue cube"\r\nc3.mp4,z\r\n',
        {"c3.mp4": "z"},
        [2, 3],
        "it is several rows; a quote in it is not closed before line 3",
    ),
    "the caption first": (
        'text,file_name\n"a red ball,c1.mp4\na blue cube",c2.mp4\nz,c3.mp4\n',
        {"c3.mp4": "z"},
        [2, 3],
        "it is several rows; a quote in it is not closed before line 3",
    ),
    "quoted names": (
        'id,file_name,text\n1,"sub/c1.MP4","a red ball\n2,"sub/c2.MP4","a blue cube"\n3,c3.mp4,z\n',
        {"c3.mp4": "z"},
        [2, 3],
        "it can not be read: ',' expected after '\"'; a quote in it is not closed before line 3",
    ),
    "an error within one row": (
        'file_name,text\nc1.mp4,"a cat\nruns" home\nc2.mp4,x\n',
        {"c2.mp4": "x"},
        [2],
        "it can not be read: ',' expected after '\"'; a quote in it is not closed before line 3",
    ),
}


@pytest.mark.parametrize("name", STRAY_QUOTES)
def test_every_row_that_a_stray_quote_takes_in_is_told(clips, name):
    table, wanted, lines, says = STRAY_QUOTES[name]
    (clips / "metadata.csv").write_bytes(table.encode())
    found, dropped = listed(clips)
    assert found == wanted
    first, *others = (f"{clips / 'metadata.csv'}, line {line}" for line in lines)
    within = f"it is within the quote that opens in line {lines[0]}"
    assert dropped == {first: says} | dict.fromkeys(others, within)


def test_honest_line_breaks_in_captions_stay(clips):
    rows = [("file_name", "text", "by"), ("a.mp4", "a cat,\nwhich runs\r\n\nand sleeps", "me"), ("b.mp4", "x\n", "a.b")]
    with (clips / "metadata.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    assert listed(clips) == ({"a.mp4": "a cat, which runs and sleeps", "b.mp4": "x"}, {})


def test_a_quote_that_is_not_closed_in_the_first_line_is_refused(clips):
    (clips / "metadata.csv").write_text('file_name,text,"by\na.mp4,x,me"\nb.mp4,y,me\n')
    with pytest.raises(ConfigError, match="can not be read: a quote in its first line is not closed there"):
        listed(clips)


NFC, NFD = "\u00e9t\u00e9", "e\u0301te\u0301"


@pytest.mark.parametrize(
    ("there", "name"),
    [
        (NFD, f"{NFC}.mp4"),
        (NFC, f"{NFD}.mp4"),
        (f"{NFD}/{NFD}", f"{NFC}/{NFC}.mp4"),
        ("sub/deep/a", "sub\\deep\\a.mp4"),
        (f"sub/{NFD}", f"sub\\{NFC}.mp4"),
        ("a\\b", "a\\b.mp4"),
    ],
)
def test_names_in_another_unicode_form_or_with_backslashes_are_found(resolve, good, clips, there, name):
    file = clips / f"{there}.mp4"
    put(good, file.parent, file.stem, None)
    (clips / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a dog"}))
    (sample,) = scan(resolve(), QUIET)["data.videos"].samples
    assert os.fsencode(sample.file) == os.fsencode(file) and report(resolve()) == []


def test_names_that_are_not_those_of_the_folder_are_told_as_what_they_are(resolve, good, clips):
    put(good, clips / "Sub", "Ab", None)
    lines = [{"file_name": name, "text": "a dog"} for name in ("Sub/ab.mp4", "sub/Ab.mp4", "Sub/none.mp4")]
    lines += [{"file_name": name, "text": "a dog"} for name in ("..\\a.mp4", "C:\\a.mp4", "\\\\host\\a.mp4")]
    (clips / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ConfigError, match="no clip of"):
        scan(resolve(), QUIET)
    assert [line["reason"] for line in report(resolve()) if "kind" not in line] == [
        "ab.mp4 is not there; the folder has Ab.mp4; file names differ by case",
        "sub is not there; the folder has Sub; file names differ by case",
        "its file_name leads out of the folder: ../a.mp4",
        "its file_name leads out of the folder: C:/a.mp4",
        "its file_name leads out of the folder: //host/a.mp4",
        "it can not be read: No such file or directory",
    ]


def test_captions_in_another_unicode_form_are_found_and_in_another_case_told(good, clips):
    put(good, clips, NFD, None)
    (clips / f"{NFC}.txt").write_text("a cat")
    put(good, clips, "Ab", None)
    (clips / "ab.TXT").write_text("a dog")
    noted = []
    found, dropped = list_clips(VideoSet(path=str(clips)), "data.videos.0", noted)
    assert [clip.caption for clip in found] == ["a cat"] and noted == []
    assert [item.reason for item in dropped] == [
        "Ab.txt is not there; the folder has ab.TXT; file names differ by case"
    ]


# ---------------------------------------------------------------------------------------------------- what is left aside

KINDS = {
    "3gp": "libx264",
    "3g2": "mpeg4",
    "f4v": "libx264",
    "m2ts": "libx264",
    "mts": "mpeg2video",
    "m2t": "mpeg2video",
    "vob": "mpeg2video",
    "ogv": "libvpx",
    "mxf": "mpeg2video",
    "asf": "wmv2",
    "nut": "mpeg4",
    "ivf": "libvpx",
    "y4m": "wrapped_avframe",
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files_that_are_read(resolve, clips, kind):
    file = write_clip(clips / f"a.{kind.upper()}", 25, codec=KINDS[kind], rate=25)
    (sample,) = scan(resolve(), QUIET)["data.videos"].samples
    assert (sample.file, sample.rate) == (file, pytest.approx(25, rel=0.05)) and report(resolve()) == []
    frames = read_clip(file, 5, 32, 48)
    assert ((frames[:, 2].permute(1, 2, 0) + 1) * 127.5 - torch.from_numpy(scene(2, 32, 48))).abs().mean() < 20


def test_avif_images_are_read(resolve, clips):
    Image.fromarray(scene(0, 48, 64)).save(clips / "a.avif", quality=95)
    (clips / "a.txt").write_text("a cat")
    (sample,) = prepare_videos(resolve({"rollout.num_training_frames": 1}), QUIET)["data.videos"].samples
    assert (
        np.abs((read_clip(sample.file, 1, 48, 64)[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5 - scene(0, 48, 64)).mean()
        < 7
    )


def test_captioned_files_that_are_not_read_are_told(resolve, good, clips):
    put(good, clips, "a")
    for name in ("b.h264", "c.wtv", "d.tiff", "e.xyz", "f.txt"):
        (clips / name).write_bytes(b"\x00\x01")
        (clips / name).with_suffix(".txt").write_text("a dog")
    (clips / "g.m2v").write_bytes(b"\x00\x01")
    for name in ("README.md", "README.txt", "a.json", "list.json", "Thumbs.db", ".DS_Store", "a.srt", "LICENSE"):
        (clips / name).write_text("{}")
    found = scan(resolve(), QUIET)
    lines = {Path(line["where"]).name: line["reason"] for line in report(resolve())}
    assert lines.keys() == {"b.h264", "c.wtv", "d.tiff", "e.txt", "f.txt", "g.m2v"}
    assert all("it can not be decoded: it is broken, or none of " in lines[n] for n in ("b.h264", "c.wtv", "d.tiff"))
    assert lines["g.m2v"] == "it has no caption (g.txt)"
    assert lines["e.txt"] == "there is no clip beside it, only e.xyz, which is of no kind that is read"
    assert lines["f.txt"] == "there is no clip beside it"
    left_out, alone = run_clips.describe_clips(resolve(), found)[1:]
    assert left_out.strip().startswith("4 left out") and alone.strip().startswith(
        "2 captions without a clip, listed in "
    )


@pytest.mark.parametrize("by_file", [False, True])
def test_clips_that_a_metadata_file_does_not_list_are_one_line(resolve, good, clips, tmp_path, by_file):
    put(good, clips / "deep", "a", None)
    for number in range(30):
        put(good, clips / "deep", f"left {number:02d}")
    put(good, tmp_path / "elsewhere", "linked", None)
    (clips / "link").symlink_to(tmp_path / "elsewhere")
    (clips / "more").symlink_to(tmp_path / "elsewhere")
    (clips / "deep" / "notes.txt").write_text("no caption here")
    rows = [{"file_name": name, "text": name} for name in ("deep/a.mp4", "more/linked.mp4")] + [{"file_name": "no.mp4"}]
    (clips / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = resolve({"data.videos": str(clips / "metadata.jsonl")} if by_file else None)
    found = scan(run, QUIET)
    lines = [line for line in report(run) if "kind" in line]
    assert [Path(line["where"]).name for line in lines] == [f"left {number:02d}.mp4" for number in range(30)]
    assert {line["reason"] for line in lines} == {f"{clips / 'metadata.jsonl'} does not list it"}
    (line,) = [line for line in run_clips.describe_clips(run, found) if "does not list" in line]
    says = f"30 clips that metadata.jsonl does not list, listed in {run.output_dir / 'data_report.jsonl'}; the first: "
    assert line.strip().startswith(says + str(clips / "deep" / "left 00.mp4"))
    rows.pop()
    (clips / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert scan(resolve({"data.on_bad_video": "error"}), QUIET)  # they are no mistake


@pytest.mark.parametrize(
    ("rate", "fps", "repeats"), [(8, 16, 2), (10, 12, 1), (16, 16, 0), (25, 16, 0), (8, None, 0), (15, 16, 1)]
)
def test_clips_that_are_filled_up_by_repeated_frames_are_counted(resolve, clips, rate, fps, repeats):
    write_clip(clips / "a.mp4", 12, rate=rate)
    run = resolve({"data.fps": fps})
    found = prepare_videos(run, QUIET)
    frames = read_clip(clips / "a.mp4", 5, 32, 48, fps)
    assert sum(torch.equal(a, b) for a, b in zip(frames.unbind(1), frames.unbind(1)[1:], strict=False)) == repeats
    if repeats:
        (line,) = report(run)
        assert line["where"] == str(clips / "a.mp4")
        assert line["reason"] == f"it has {rate} frames a second; at {fps}, {repeats} of 5 frames are repeats"
        says = "1 clips of fewer frames a second than data.fps, which repeat frames, listed in "
        assert run_clips.describe_clips(run, found)[1].strip().startswith(says)
    else:
        assert report(run) == [] and len(run_clips.describe_clips(run, found)) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", b"\xff\xfe\x00", "can not be read: it is UTF-16; save it as UTF-8"),
        ("metadata.csv", "file_name,text\n".encode("utf-16"), "can not be read: it is UTF-16; save it as UTF-8"),
        ("metadata.csv", b'file_name,"te', "can not be read: unexpected end of data"),
        ("metadata.parquet", b"no parquet", "can not be read: not valid parquet"),
        ("metadata.jsonl", b"", "has no column file_name; its columns: none"),
        ("metadata.csv", b"", "has no column file_name; its columns: none"),
        ("metadata.csv", b"path,text\na.mp4,x\n", "has no column file_name; its columns: path, text"),
        ("metadata.csv", b"file_name,words\na.mp4,x\n", "has no column text or caption or prompt"),
        ("metadata.jsonl", b"not json\n", "has no column file_name"),
    ],
)
def test_metadata_that_can_not_be_read(clips, name, content, says):
    (clips / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        listed(clips)
    assert str(caught.value).startswith("data.videos.0") and says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_data_sets_that_are_none(good, clips, tmp_path):
    def says(path: Path, **options) -> str:
        with pytest.raises(ConfigError) as caught:
            listed(path, **options)
        return str(caught.value)

    assert "no such folder; valid are" in says(tmp_path / "none")
    assert "holds no clips; valid are" in says(clips)
    put(good, clips)
    assert "it is a file; valid are" in says(clips / "good.mp4")
    assert says(clips, caption_column="x").startswith("data.videos.0.caption_column: x: ")
    for name in ("metadata.csv", "metadata.jsonl"):
        (clips / name).write_text("")
    assert "holds metadata.csv and metadata.jsonl; name the one that counts" in says(clips)


# ---------------------------------------------------------------------------------------------------- bad clips


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def nan_rate(file: Path) -> None:
    """An AVI whose header says 0 / 0 frames a second."""
    write_clip(file, 6, codec="mpeg4", caption=None)
    data = bytearray(file.read_bytes())
    at = data.index(b"strh") + 8
    data[at + 20 : at + 28] = struct.pack("<II", 0, 0)
    data[32:36] = struct.pack("<I", 0)
    file.write_bytes(bytes(data))


def huge(file: Path) -> None:
    """A PNG that claims 60000 x 60000 pixels."""
    Image.new("L", (8, 8)).save(file)
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(bytes(data))


def audio_alone(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def huge_frames(file: Path) -> None:
    """An AVI that claims raw frames of 12000 x 12000 pixels."""
    write_clip(file, 6, (32, 48), "rawvideo", "bgr24", caption=None)
    data = bytearray(file.read_bytes())
    at = data.index(b"strf") + 12
    data[at : at + 8] = struct.pack("<ii", 12000, 12000)
    file.write_bytes(bytes(data))


def unknown_codec(file: Path) -> None:
    write_clip(file, 6, caption=None)
    file.write_bytes(file.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))


def garbled(file: Path) -> None:
    """The container is whole; what is in it is noise."""
    write_clip(file, 6, caption=None)
    data = bytearray(file.read_bytes())
    start = data.index(b"mdat") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0] - 8
    data[start : start + length] = bytes((i * 97 + 13) % 256 for i in range(length))
    file.write_bytes(bytes(data))


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hosts\n#EXT-X-ENDLIST\n"

# What the clip is, and what the report says of it.
BAD = {
    "empty file": (lambda f: f.write_bytes(b""), ".mp4", "it is an empty file"),
    "text": (lambda f: f.write_text("hello " * 100), ".mp4", "it can not be decoded"),
    "zeros": (lambda f: f.write_bytes(bytes(5000)), ".mkv", "it can not be decoded"),
    "noise": (lambda f: f.write_bytes(bytes((i * i) % 251 for i in range(5000))), ".avi", "it can not be decoded"),
    "an html page": (lambda f: f.write_text("<!DOCTYPE html><html>404</html>"), ".webm", "it can not be decoded"),
    "a playlist": (lambda f: f.write_text(PLAYLIST), ".mp4", "it can not be decoded"),
    "a concat script": (
        lambda f: f.write_text("ffconcat version 1.0\nfile /etc/hosts\n"),
        ".mp4",
        "can not be decoded",
    ),
    "a list for git": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        ".mp4",
        "not be decoded",
    ),
    "cut at its head": (lambda f: (write_clip(f, 6, caption=None), cut(f, 0.05)), ".mp4", "it can not be decoded"),
    "cut in the middle": (lambda f: (write_clip(f, 6, caption=None), cut(f, 0.5)), ".mp4", "it can not be decoded"),
    "cut at its end": (
        lambda f: (write_clip(f, 6, (64, 96), *LOSSLESS, caption=None), cut(f, 0.5)),
        ".mkv",
        "frames; 5 are needed",
    ),
    "garbled": (garbled, ".mp4", "it"),
    "short": (lambda f: write_clip(f, 4, caption=None), ".mp4", "it has 4 frames; 5 are needed"),
    "one frame": (lambda f: write_clip(f, 1, caption=None), ".mkv", "it has 1 frames; 5 are needed"),
    "short gif": (lambda f: write_clip(f, 2, (32, 32), "gif", "rgb8", 10, caption=None), ".gif", "5 are needed"),
    "an unknown codec": (unknown_codec, ".mkv", "its codec is unknown"),
    "a thread": (
        lambda f: write_clip(f, 6, (32, 1280), caption=None),
        ".mp4",
        "it is 1280 wide and 32 high; at most 32 to 1",
    ),
    "sound alone": (audio_alone, ".mp4", "it holds no video"),
    "a pipe": (os.mkfifo, ".mp4", "it is no file"),
    "a link to nowhere": (lambda f: f.symlink_to("nowhere.mp4"), ".mp4", "it can not be read: No such file"),
    "a link to itself": (lambda f: f.symlink_to(f.name), ".mp4", "it can not be read: Too many levels"),
    "an image": (lambda f: Image.new("RGB", (64, 64)).save(f), ".png", "it is an image; 5 frames are needed"),
    "a broken image": (lambda f: f.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), ".png", "it can not be decoded"),
    "half an image": (
        lambda f: (Image.effect_noise((64, 64), 50).save(f), cut(f, 0.5)),
        ".jpg",
        "it can not be decoded",
    ),
    "a huge image": (huge, ".png", "it has more than 67108864 pixels"),
    "huge frames": (huge_frames, ".avi", "its frames have 12000 x 12000 pixels; valid are 1 to 67108864"),
    "an empty image": (lambda f: f.write_bytes(b""), ".jpg", "it is an empty file"),
    "an image named as a video": (lambda f: Image.new("RGB", (64, 64)).save(f, "JPEG"), ".mp4", "can not be decoded"),
    "a video named as an image": (
        lambda f: write_clip(f.with_suffix(".mkv"), 6, caption=None).rename(f),
        ".png",
        "not be decoded",
    ),
    "tiny": (
        lambda f: write_clip(f, 6, (16, 96), caption=None),
        ".mp4",
        "it has 96 x 16 pixels; data.minimum_size is 24",
    ),
}
CAPTIONS = {
    "no caption": (None, "it has no caption (bad.txt)"),
    "empty caption": (b"", "its caption is empty"),
    "blank caption": (b" \r\n\t\xc2\xa0", "its caption is empty"),
    "mark alone": (b"\xef\xbb\xbf", "its caption is empty"),
    "latin-1": ("un été".encode("latin-1"), "its caption is no UTF-8 text"),
    "utf-16": ("a cat".encode("utf-16"), "its caption is no UTF-8 text"),
    "binary": (bytes(range(32, 127)) + b"\0" * 9, "its caption is binary"),
    "endless": (b"word " * 30_000, "its caption has 150000 bytes"),
}


def report(run: setup.Run) -> list[dict]:
    file = run.output_dir / "data_report.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def bad_clip(make: Callable, suffix: str) -> Callable:
    def place(good: Path, clips: Path, monkeypatch) -> None:
        make(clips / f"bad{suffix}")
        (clips / "bad.txt").write_text("a dog")

    return place


def bad_caption(caption: bytes | None, name: str = "bad") -> Callable:
    return lambda good, clips, monkeypatch: put(good, clips, name, caption)


def bad_line(line: str) -> Callable:
    def place(good: Path, clips: Path, monkeypatch) -> None:
        (clips / "metadata.jsonl").write_text('{"file_name": "good.mp4", "text": "a red cat runs"}\n' + line)

    return place


def odd_caption(make: Callable[[Path], object]) -> Callable:
    """A clip whose caption is no plain file."""

    def place(good: Path, clips: Path, monkeypatch) -> None:
        make(put(good, clips, "bad", None).with_suffix(".txt"))

    return place


def write_nan_rate(good: Path, clips: Path, monkeypatch) -> None:
    nan_rate(clips / "bad.avi")
    (clips / "bad.txt").write_text("a dog")


GOOD_LINE = '{"file_name": "good.mp4", "text": "a red cat runs"}'
MALFORMED = (
    {name: (bad_clip(make, suffix), reason) for name, (make, suffix, reason) in BAD.items()}
    | {name: (bad_caption(caption), reason) for name, (caption, reason) in CAPTIONS.items()}
    | {f"line {number}": (bad_line(line), reason) for number, (line, reason) in enumerate(LINES.items())}
    | {
        "no frame rate": (write_nan_rate, "it lasts 0."),
        "a folder as caption": (odd_caption(Path.mkdir), "it has no caption (bad.txt)"),
        "a pipe as caption": (odd_caption(os.mkfifo), "it has no caption (bad.txt)"),
        "a loop as caption": (odd_caption(lambda f: f.symlink_to(f.name)), "it has no caption (bad.txt)"),
        "a name in unicode": (bad_caption(b"", "\u96ea\u306e\u72d0 \U0001f3ac"), "its caption is empty"),
        "a name of two lines": (bad_caption(b"", "two\nlines\x1b[31m"), "its caption is empty"),
        "the same clip twice": (bad_caption(b"a red  cat runs", "twice"), "it is the same as "),
        "the same line twice": (bad_line(GOOD_LINE), "it is the same as "),
        "a line without its file": (
            bad_line('{"file_name": "no.mp4", "text": "x"}'),
            "it can not be read: No such file",
        ),
    }
)
assert len(MALFORMED) >= 50


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_inputs_are_left_out_with_a_reason(resolve, good, clips, name, monkeypatch):
    place, reason = MALFORMED[name]
    put(good, clips)
    place(good, clips, monkeypatch)
    changes = {"data.minimum_size": 24, "data.fps": 12 if name == "no frame rate" else None}
    found = prepare_videos(resolve(changes), QUIET)["data.videos"]
    assert [sample.file.name for sample in found.samples] == ["good.mp4"]
    (line,) = report(resolve(changes))
    assert line["key"] == "data.videos" and line["where"].startswith(str(clips)) and reason in line["reason"], line
    assert (line["where"] + line["reason"]).isprintable() and len(line["reason"]) < 250
    with pytest.raises(ConfigError, match=r"data.videos: .*; mend it, or set data.on_bad_video: skip"):
        prepare_videos(resolve(changes | {"data.on_bad_video": "error"}), QUIET)


def test_what_can_not_be_read_for_a_while_is_not_forgotten(resolve, good, clips, tmp_path):
    """A link into a mount that comes and goes: before clips are looked at, and before one is encoded."""
    put(good, clips)
    mount, away = tmp_path / "mount", tmp_path / "away"
    write_clip(mount / "b.mp4", 7, caption=None)
    (clips / "b.mp4").symlink_to(mount / "b.mp4")
    (clips / "b.txt").write_text("a dog")
    mount.rename(away)
    run = resolve()
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == 1 and len(report(run)) == 1
    away.rename(mount)
    scanned = scan(run, QUIET)
    assert len(scanned["data.videos"].samples) == 2
    mount.rename(away)
    assert len(prepare_videos(run, QUIET, scanned)["data.videos"].samples) == 1 and len(report(run)) == 1
    away.rename(mount)
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == 2 and report(run) == []


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from rich.console import Console
from dmdtrain.config import load
from dmdtrain.data.decode import read_header
from dmdtrain.train import setup
from dmdtrain.train.clips import scan
from dmdtrain.models.wan import load_vae
from dmdtrain.train.prepare_videos import prepare_videos

place = Path(sys.argv[1])
run = setup.resolve(load(place / "run.yaml"))
load_vae(run.base)  # what is imported late is imported now
read_header(place / "clips" / "c.mp4")
Console(quiet=True).print(":")
if os.getuid() == 0:  # whom no mode keeps from a file
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def used(scanned=None):
    found = prepare_videos(run, Console(quiet=True), scanned)["data.videos"]
    dropped = {os.path.relpath(item.where, place / "clips"): item.reason for item in found.dropped}
    return sorted(sample.file.stem for sample in found.samples), dropped

for name in ("a.mp4", "b.txt", "folder"):
    (place / "clips" / name).chmod(0)
denied = "can not be read: Permission denied"
found, dropped = used()
assert found == ["c", "d"], found
assert dropped == {"a.mp4": f"it {denied}", "b.mp4": f"its caption {denied}", "folder": f"the folder {denied}"}, dropped

(place / "clips" / "a.mp4").chmod(0o644)
scanned = scan(run, Console(quiet=True))
assert len(scanned["data.videos"].samples) == 3
(place / "clips" / "a.mp4").chmod(0)  # between the look at it and its turn to be encoded
found, dropped = used(scanned)
assert found == ["c", "d"] and dropped["a.mp4"] == f"it {denied}", (found, dropped)

for name, mode in {"a.mp4": 0o644, "b.txt": 0o644, "folder": 0o755}.items():
    (place / "clips" / name).chmod(mode)
assert used() == (["a", "b", "c", "d", "e"], {})
"""


def test_what_a_user_may_not_read_is_told_and_taken_as_soon_as_he_may(settings, wan_folder):
    """Real modes of real files, for a process without the rights of root."""
    with tempfile.TemporaryDirectory() as made:  # pytest's folders are closed to others
        place = Path(made)
        shutil.copytree(wan_folder, place / "wan")
        for number, name in enumerate(("a", "b", "c", "d", "folder/e")):
            write_clip(place / "clips" / f"{name}.mp4", 6 + number)
        (place / "prompts.txt").write_text("a cat\n")
        data = settings["data"] | {"prompts": str(place / "prompts.txt"), "videos": str(place / "clips")}
        values = settings | {"dmd": {"real_data_loss_weight": 0.5}, "rollout": {"num_training_frames": 2}, "data": data}
        values |= {"model": settings["model"] | {"base": str(place / "wan")}, "output_dir": str(place / "run")}
        (place / "run.yaml").write_text(yaml.safe_dump(values))
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            if os.getuid() == 0:
                os.chown(path, 65534, 65534)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HOME": made}
        command = [sys.executable, "-c", WITHOUT_RIGHTS, made]
        result = subprocess.run(command, env=environment, cwd=made, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr


def with_sound(file: Path, garbled: bool) -> Path:
    """A clip of 6 frames with half a second of a tone; garbled: every packet of the sound is noise instead."""
    draws = np.random.default_rng(0)
    with av.open(str(file), "w") as container:
        picture = container.add_stream("libx264", rate=16)
        picture.height, picture.width, picture.pix_fmt = 32, 48, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(6):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(scene(number, 32, 48), format="rgb24")))
        container.mux(picture.encode())
        for number in range(8):
            tone = np.sin((np.arange(1024) + 1024 * number) / 6).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    if garbled:
        with av.open(str(file)) as container:
            packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        data = file.read_bytes()
        for packet in packets:
            assert data.count(packet) == 1
            data = data.replace(packet, draws.bytes(len(packet)))
        file.write_bytes(data)
    return file


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_broken_sound_does_not_matter(resolve, clips, tmp_path, suffix):
    """Nor does sound at all: the frames are those of the clip without."""
    file = with_sound(clips / f"a.{suffix}", garbled=True)
    (clips / "a.txt").write_text("a red cat runs")
    with av.open(str(file)) as container, pytest.raises(av.FFmpegError):
        for _ in container.decode(audio=0):
            pass
    (sample,) = prepare_videos(resolve(), QUIET)["data.videos"].samples
    assert sample.file == file and report(resolve()) == []
    whole = with_sound(tmp_path / f"whole.{suffix}", garbled=False)
    silent = write_clip(tmp_path / f"silent.{suffix}", 6, caption=None)
    assert read_header(file) == read_header(whole)
    assert read_header(file).frames == read_header(silent).frames == 6
    assert torch.equal(read_clip(file, 5, 32, 48), read_clip(whole, 5, 32, 48))


def test_what_is_unusual_and_fine(resolve, good, clips):
    put(good, clips, "new\nline\x1b", "a dog")
    put(good, clips, "long " + "x" * 200, "a cat " * 2000)
    os.rename(put(good, clips, "x", "a cat"), os.fsencode(clips) + b"/\xff\xfe.mp4")
    os.rename(clips / "x.txt", os.fsencode(clips) + b"/\xff\xfe.txt")
    write_clip(clips / "wide.mp4", 6, (32, 640))
    write_clip(clips / "named wrongly.mp4", 6, (32, 48), "libvpx-vp9").rename(clips / "webm in.avi")
    (clips / "named wrongly.txt").rename(clips / "webm in.txt")
    shutil.copy(good, clips / "UPPER.MP4")
    (clips / "UPPER.txt").write_text("upper")
    tagged = put(good, clips, "tagged", "tags in latin-1")
    assert b"Lavf" in tagged.read_bytes()
    tagged.write_bytes(tagged.read_bytes().replace(b"Lavf", "Läff".encode("latin-1")))
    nan_rate(clips / "rate.avi")
    (clips / "rate.txt").write_text("no rate")
    run = resolve()
    found = prepare_videos(run, QUIET)["data.videos"]
    assert len(found.samples) == 8 and report(run) == []
    faster = prepare_videos(resolve({"data.fps": 12}), QUIET)["data.videos"]
    assert len(faster.samples) == 7 and "rate.avi" in faster.dropped[0].where  # without a rate it lasts 0.24 s
    bad = put(good, clips, "two\nlines", "")
    assert "two\\nlines.mp4" in scan(run, QUIET)["data.videos"].dropped[0].where and bad.exists()


def test_duplicates_are_left_out(resolve, good, clips):
    put(good, clips, "a")
    put(good, clips, "b")  # the same content and caption
    put(good, clips, "c", "another caption")
    run = resolve()
    found = scan(run, QUIET)["data.videos"]
    assert [sample.file.name for sample in found.samples] == ["a.mp4", "c.mp4"]
    assert [line["reason"] for line in report(run)] == [f"it is the same as {clips / 'a.mp4'}"]


def test_images_serve_runs_on_one_frame(resolve, clips):
    Image.new("RGB", (64, 48), "red").save(clips / "a.png")
    (clips / "a.txt").write_text("a red thing")
    run = resolve({"rollout.num_training_frames": 1})
    (sample,) = prepare_videos(run, QUIET)["data.videos"].samples
    assert sample.size == (48, 32) and report(run) == []


def test_animated_images_serve_runs_on_several_frames(resolve, clips):
    pictures = [Image.fromarray(scene(number, 32, 48)) for number in range(6)]
    for suffix in ("webp", "png"):
        pictures[0].save(clips / f"{suffix}.{suffix}", save_all=True, append_images=pictures[1:], duration=100)
        (clips / f"{suffix}.txt").write_text("a cat")
    run = resolve({"data.fps": 10})
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == 2 and report(run) == []


def test_nothing_usable_is_refused_and_reported(resolve, good, clips, settings):
    put(good, clips, "a", "")
    put(good, clips, "b", "")
    run = resolve()
    with pytest.raises(ConfigError) as caught:
        scan(run, QUIET)
    says = (
        f"data.videos.0: no clip of {clips} can be used; they need a caption and 5 frames; the first: {clips / 'a.mp4'}"
    )
    assert str(caught.value) == f"{says}: its caption is empty"
    assert len(report(run)) == 2


# ---------------------------------------------------------------------------------------------------- looking once


def test_a_file_is_opened_once_until_it_changes(resolve, good, clips, monkeypatch):
    opened = []
    inspect = run_clips.inspect
    monkeypatch.setattr(run_clips, "inspect", lambda file: opened.append(file.name) or inspect(file))
    put(good, clips, "a")
    put(good, clips, "b", "b")
    (clips / "c.mp4").write_text("broken")
    (clips / "c.txt").write_text("c")
    run = resolve()
    assert len(scan(run, QUIET)["data.videos"].samples) == 2 and sorted(opened) == ["a.mp4", "b.mp4", "c.mp4"]
    scan(run, QUIET)
    assert len(opened) == 3
    write_clip(clips / "c.mp4", 6, caption=None)
    assert len(scan(run, QUIET)["data.videos"].samples) == 3 and opened[3:] == ["c.mp4"]
    index = run.output_dir / "cache" / "videos" / "sources.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:-1]) + b"[1]\nnot json\n" + lines[-1][:20])  # a kill in mid-line, and worse
    assert len(scan(run, QUIET)["data.videos"].samples) == 3 and opened[4:] == ["c.mp4"]
    assert len(scan(run, QUIET)["data.videos"].samples) == 3 and len(opened) == 5


def test_lines_of_the_index_that_are_no_sources_are_read_again(resolve, good, clips):
    put(good, clips)
    run = resolve()
    assert len(scan(run, QUIET)["data.videos"].samples) == 1
    index = run.output_dir / "cache" / "videos" / "sources.jsonl"
    line = json.loads(index.read_text())
    for wrong in ({"header": [48, 32]}, {"header": ["a", 1, 2, 3]}, {"header": 5}, {"sha256": 5}, {"failed": [1]}):
        index.write_text(json.dumps(line | wrong) + "\n")
        assert len(scan(run, QUIET)["data.videos"].samples) == 1


def test_what_an_earlier_version_found_is_looked_for_again(resolve, good, clips):
    """Its lines have four numbers and no version; what failed then may work now."""
    file = put(good, clips)
    run = resolve()
    scan(run, QUIET)
    index = run.output_dir / "cache" / "videos" / "sources.jsonl"
    line = json.loads(index.read_text())
    assert line.pop("version") == 2 and line["header"] == [48, 32, 6, pytest.approx(0.375), False]
    old = line | {"header": [48, 32, 1, 0.0], "failed": {run_clips.how_read(run): "it has 1 frames"}}
    for wrong in (old, old | {"header": None, "bad": "it holds no frames"}):
        index.write_text(json.dumps(wrong) + "\n")
        assert [sample.file for sample in scan(run, QUIET)["data.videos"].samples] == [file]
    assert json.loads(index.read_text().splitlines()[-1]) == line | {"version": 2}


def test_interlaced_clips_are_counted(resolve, good, clips):
    put(good, clips)
    write_clip(clips / "tv.mp4", 6, options={"x264-params": "tff=1"}, caption="a dog")
    run = resolve()
    for _ in range(2):  # a second start opens nothing
        text = "\n".join(run_clips.describe_clips(run, scan(run, QUIET)))
        assert "2 clips" in text and "1 of them are interlaced, and are deinterlaced" in text


def test_warnings_are_as_before_after_images_are_read_in_threads(resolve, clips, monkeypatch):
    monkeypatch.setattr(run_clips, "READERS", 8)
    for number in range(40):
        Image.new("RGB", (300 + number, 300), (number, 0, 0)).save(clips / f"{number}.png")
        (clips / f"{number}.txt").write_text("a cat")
    before = list(warnings.filters)
    assert len(scan(resolve({"rollout.num_training_frames": 1}), QUIET)["data.videos"].samples) == 40
    assert list(warnings.filters) == before


# ---------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("size", "rounding", "wanted"),
    [
        ((1920, 1080), 2, (480, 848)),
        ((1080, 1920), 2, (848, 480)),
        ((1280, 1000), 2, (560, 720)),
        ((1000, 1000), 2, (640, 640)),
        ((1000, 1000), 0, (640, 640)),
        ((1300, 1000), 0, (640, 640)),  # 1.3 is 1
        ((400, 1000), 0, (912, 448)),  # 2.5 is 2
        ((10000, 100), 2, (320, 1280)),
    ],
)
def test_sizes_of_buckets(size, rounding, wanted):
    area = 640 * 640 if size[0] not in (1920, 1080) else 832 * 480
    found = bucket_size(*size, area, 16, rounding)
    assert found == wanted
    assert all(edge % 16 == 0 for edge in found) and found[0] * found[1] == pytest.approx(area, rel=0.06)


def test_each_clip_in_the_bucket_of_its_aspect(resolve, clips):
    for name, size in (("a", (64, 96)), ("b", (96, 64)), ("c", (64, 98)), ("d", (64, 64))):
        write_clip(clips / f"{name}.mp4", 6, size, caption=name)
    sizes = lambda **c: {  # noqa: E731
        s.caption: s.size for s in scan(resolve({f"data.{k}": v for k, v in c.items()}), QUIET)["data.videos"].samples
    }
    assert set(sizes(resolution="64x64").values()) == {(64, 64)}
    assert sizes(resolution="64x64", buckets=True) == {"a": (48, 80), "b": (80, 48), "c": (48, 80), "d": (64, 64)}
    coarse = sizes(resolution="64x64", buckets=True, aspect_bucket_rounding=0)
    assert coarse == {"a": (48, 96), "b": (96, 48), "c": (48, 96), "d": (64, 64)}


# ---------------------------------------------------------------------------------------------------- the order


def sampler(repeats=(1, 1), weights=(None, None), seed: int = 0) -> BucketSampler[str]:
    """10 wide and 5 tall items of set 0; 20 wide ones of set 1."""
    items = [f"a{i}" for i in range(15)] + [f"b{i}" for i in range(20)]
    buckets = ["wide"] * 10 + ["tall"] * 5 + ["wide"] * 20
    return BucketSampler(streams_of(items, buckets, [0] * 15 + [1] * 20, weights, repeats), seed)


def bucket_of(item: str) -> str:
    return "tall" if item[0] == "a" and int(item[1:]) >= 10 else "wide"


def test_draws_are_of_one_bucket_and_every_item_comes_as_often():
    drawn = sampler()
    batches = [drawn.draw(5) for _ in range(70)]
    assert all(len({bucket_of(item) for item in batch}) == 1 for batch in batches)
    counts = Counter(item for batch in batches for item in batch)
    assert len(counts) == 35 and set(counts.values()) <= {9, 10, 11}
    whole = BucketSampler([Stream("one", 1.0, list(range(12)))], 0)
    for _ in range(3):  # every item once an epoch, in another order
        assert sorted(whole.draw(12)) == list(range(12))
    assert whole.draw(12) != whole.draw(12)


def test_repeats_and_weights():
    def share_of_a(**options) -> float:
        drawn = sampler(**options)
        items = [item for _ in range(400) for item in drawn.draw(2)]
        return sum(item[0] == "a" for item in items) / len(items)

    assert share_of_a() == pytest.approx(15 / 35, abs=0.01)
    assert share_of_a(repeats=(4, 1)) == pytest.approx(60 / 80, abs=0.01)
    assert share_of_a(weights=(1.0, 1.0)) == pytest.approx(1 / 2, abs=0.01)
    assert share_of_a(weights=(1.0, 9.0)) == pytest.approx(1 / 10, abs=0.01)


def test_the_seed_decides_the_order():
    first, again, other = (sampler(seed=seed) for seed in (3, 3, 4))
    drawn = [[s.draw(4) for _ in range(20)] for s in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_an_exact_resume_in_mid_epoch(at):
    whole, stopped, resumed = (sampler(repeats=(2, 1)) for _ in range(3))
    wanted = [whole.draw(3) for _ in range(at + 40)]
    for _ in range(at):
        stopped.draw(3)
    resumed.load_state_dict({key: value.clone() for key, value in stopped.state_dict().items()})
    assert [resumed.draw(3) for _ in range(40)] == wanted[at:]
    with pytest.raises(ValueError, match="36 items now, which are not those of when the checkpoint was saved"):
        BucketSampler([Stream("one", 1.0, list(range(36)))], 0).load_state_dict(stopped.state_dict())


def test_shards_take_the_parts_of_one_draw():
    whole, ranks = sampler(), [sampler().shard(rank, 2) for rank in range(2)]
    for _ in range(30):
        drawn = [rank.draw(2) for rank in ranks]
        assert drawn[0] + drawn[1] == whole.draw(4)


def test_states_are_tensors():
    state = sampler().state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())


# ---------------------------------------------------------------------------------------------------- the command


def write(settings: dict, tmp_path: Path, videos, **data) -> Path:
    data = settings["data"] | {"videos": videos} | data
    values = settings | {"dmd": {"real_data_loss_weight": 0.5}, "data": data}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_mistakes_are_told_before_a_model_is_loaded(settings, good, clips, tmp_path, monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(setup, "load_transformer", forbidden)
    monkeypatch.setattr("dmdtrain.models.encode.load_text_encoder", forbidden)
    monkeypatch.setattr("dmdtrain.train.prepare_videos.codec", forbidden)
    put(good, clips)
    fit = ("fit", write(settings, tmp_path, [str(clips), {"path": str(tmp_path / "none")}]))
    refused(*fit, says=["data.videos.1: ", "no such folder"])
    fit = ("fit", write(settings, tmp_path, str(clips)), "--dry-run")
    refused(*fit, says=["data.videos.0: no clip of", "they need a caption and 9 frames", "it has 6 frames"])
    fit = ("fit", write(settings, tmp_path, str(clips), on_bad_video="error"))
    refused(
        *fit, says=["data.videos: ", "good.mp4: it has 6 frames; 9 are needed; mend it, or set data.on_bad_video: skip"]
    )
    assert {f.name for f in (tmp_path / "run").iterdir()} == {".lock", "cache", "data_report.jsonl"}
