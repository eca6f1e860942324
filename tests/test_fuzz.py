"""Whatever is in a configuration: a checked `Config` or one line, never a traceback and never a hang."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmdtrain.config import Config, ConfigError, build, dump, groups, known_keys, load, nested_get, read
from dmdtrain.reference import show
from dmdtrain.simpletuner.importer import import_config
from dmdtrain.strict_yaml import inline, parse

COMMON: dict[str, Any] = dict(deadline=5000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=300, **COMMON)
MANY = settings(max_examples=1000, **COMMON)
SLOW = settings(max_examples=20_000, **COMMON | {"derandomize": False})

KEYS = known_keys()
numbers = st.one_of(
    st.integers(),
    st.integers(-3, 30),
    st.floats(allow_subnormal=False),
    st.sampled_from(
        [0, 1, -1, 0.0, -0.0, 0.5, 1e-8, 1e300, -1e300, 2**31, 2**64, 10**90, math.nan, math.inf, -math.inf]
    ),
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["1000,757,522", "1000,,", "480", "832x480", "0x0", "16:9", "16:0", "no", "null", "", " ", "nan", "inf",
                     "1e400", "9" * 500, "9" * 5000, "a\nb", "~", "=", "<<", "*a", "&a", "!!int", "\x85", "\u2028", "\ud800"]),
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.one_of(texts, st.sampled_from(KEYS)), inner, max_size=4)
    ),
    max_leaves=12,
)


def likely(key: str) -> st.SearchStrategy[Any]:
    """Values of a key that may well be valid: its default's kind, a choice, a count."""
    default = nested_get(Config(), key)
    near: list[st.SearchStrategy[Any]] = [st.just(default), anything]
    if isinstance(default, bool):
        near.append(st.booleans())
    elif isinstance(default, int | float):
        near += [st.integers(0, 40), st.floats(0, 2, allow_subnormal=False)]
    group, _, name = key.rpartition(".")
    field = (groups()[group] if group else Config).model_fields[name]
    words = [word for word in getattr(field.annotation, "__args__", ()) if isinstance(word, str)]
    if words:
        near.append(st.sampled_from(words))
    return st.one_of(near)


one_key = st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), likely(key)))
trees = st.one_of(
    anything,
    st.dictionaries(st.one_of(st.sampled_from([*groups(), "output_dir", "version"]), texts), anything, max_size=4),
    st.lists(one_key, max_size=8).map(lambda pairs: nest(dict(pairs))),
)


def nest(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    return tree


def checked(make, *args: Any) -> Config | None:
    """The configuration, or None where it was refused in one short line."""
    try:
        config = make(*args)
    except ConfigError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, line
        assert len(line) < 2000, line
        line.encode()
        return None
    assert isinstance(config, Config)
    return config


def round_trips(config: Config, file: Path) -> None:
    """What is dumped is what is loaded."""
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def check_tree(values: Any, file: Path) -> None:
    """As JSON, which is YAML, where it can be written so; and as what some code hands to `build`."""
    file.write_text(json.dumps(values, allow_nan=False, default=str) if writable(values) else "train: {seed: 1}")
    loaded = checked(load, file)
    if loaded is not None:
        round_trips(loaded, file)
    if isinstance(values, dict):
        checked(build, values)


def writable(values: Any) -> bool:
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        return False
    return True


@MANY
@given(values=trees)
def test_any_values(values, file):
    check_tree(values, file)


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=15, **COMMON)
@given(data=st.data())
def test_every_key_with_any_value(key, data, file):
    config = checked(build, nest({key: data.draw(likely(key))}))
    if config is not None:
        parsed = checked(lambda: build(parse(show(config, {}))))
        # What no file of text can hold may be built by hand, but is refused when it is read.
        assert parsed == config or "\0" in str(nested_get(config, key))


@FEW
@given(text=st.one_of(st.text(alphabet=st.sampled_from(list("ab:-{}[]&*!#|>'\"%@`,?<=~ \n\t0159.e_xno")), max_size=60),
                      st.text(max_size=60)))  # fmt: skip
def test_any_text(text, file):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    checked(load, file)


@FEW
@given(data=st.binary(max_size=40))
def test_any_bytes(data, file):
    file.write_bytes(data)
    checked(load, file)


@FEW
@given(values=st.one_of(anything, one_key.map(lambda pair: nest(dict([pair])))))
def test_what_yaml_dumps_is_read_as_it_reads_it(values):
    """On plain trees the strict reader and PyYAML agree."""
    try:
        text = yaml.safe_dump(values, allow_unicode=True)
        ours = parse(text)
    except (ValueError, yaml.YAMLError):
        return
    theirs = yaml.safe_load(text)
    assert str(ours) == str(theirs)  # nan is not equal to itself


@FEW
@given(value=st.one_of(texts, st.lists(texts, max_size=3), numbers, st.none(), st.booleans()))
def test_inline_is_one_line_that_is_read_back(value):
    text = inline(value)
    assert len(text.splitlines()) <= 1
    try:
        back = parse(text)
    except ValueError as error:  # what no file of text can hold, and absurd numbers
        assert "no text" in str(error) or "a number of" in str(error)  # noqa: PT017
    else:
        assert str(back) == str(value)


@FEW
@given(
    key=st.one_of(st.sampled_from([*KEYS, *groups(), "a.b.c.d.e", "train.", ".", "..", " train.seed "]), texts),
    text=st.one_of(texts, anything.map(str)),
)
def test_any_override(key, text, file):
    file.write_text("train: {seed: 1}\n")
    config = checked(load, file, [f"{key}={text}"])
    if config is not None:
        values, origins = read(file, [f"{key}={text}"])
        assert set(origins) <= set(KEYS)
        show(build(values), origins)


QUICKSTART = json.loads((Path(__file__).parent / "simpletuner_quickstart.json").read_text(encoding="utf-8"))
THEIRS = [*QUICKSTART, *(f"distillation_config.{key}" for key in QUICKSTART["distillation_config"])]


@FEW
@given(
    changes=st.dictionaries(st.one_of(st.sampled_from(THEIRS), texts), anything, max_size=5),
    dataset=st.one_of(anything, st.lists(st.dictionaries(st.sampled_from(["id", "video", "resolution", "dataset_type",
        "resolution_type", "caption_strategy", "num_frames"]), st.one_of(anything, st.just("video"))), max_size=2)),
    causal=st.booleans(),
)  # fmt: skip
def test_any_configuration_of_simpletuner(changes, dataset, causal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs = QUICKSTART | {"distillation_config": dict(QUICKSTART["distillation_config"])}
    for key, value in changes.items():
        (theirs["distillation_config"] if "." in key else theirs)[key.rpartition(".")[2]] = value
    theirs |= {"validation_prompt_library": False, "data_backend_config": "data.json"}
    theirs |= {key: QUICKSTART[key] for key in ("model_family", "distillation_method", "pretrained_model_name_or_path")}
    (folder / "config.json").write_text(json.dumps(theirs))
    (folder / "data.json").write_text(json.dumps(dataset))
    out = folder / "run.yaml"
    try:
        report, complete = import_config(folder / "config.json", None, out, causal=causal)
    except ConfigError:
        assert not out.exists()
        return
    assert complete == ("refused (0)" in report)
    load(out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@SLOW
@given(values=trees)
def test_any_values_for_long(values, file):
    check_tree(values, file)
