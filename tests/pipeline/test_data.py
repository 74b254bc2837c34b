# SPDX-License-Identifier: Apache-2.0
"""Functions as data, parts of a data set, labels, and the data that needs no download; files: test_data_files.py."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.data import (
    Dataset,
    Example,
    labels_to_ids,
    labels_to_scores,
    load_dataset,
    standard_library_docstrings,
)

E = Example


# --- functions ---


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current folder; return its name."""
    monkeypatch.chdir(tmp_path)
    name = f"calibration_{tmp_path.name.replace('-', '_')}"

    def write(source):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_function_yields_text(module):
    path = list(sys.path)
    name = module(
        "def f():\n    yield 'a'\n    yield {'text': 'b', 'label': 1}\n    yield {'text': 'c', 'label': 'x'}\n"
    )
    found = load_dataset(f"{name}:f")
    assert list(found) == [E("a"), E("b", label=1), E("c", label="x")]
    assert (found.kind, found.name) == ("text", f"{name}:f")
    assert sys.path == path


def test_a_function_yields_arrays_and_its_hash_follows_them(module):
    name = module(
        "import numpy as np\n"
        "class Data:\n"
        "    @staticmethod\n"
        "    def one(): return [{'ids': np.array([1, 2]), 'x': [0.5], 'label': np.int64(3)}]\n"
        "def same(): yield {'x': np.array([0.5]), 'ids': np.array([1, 2], '>i8'), 'label': 3}\n"
        "def other(): yield {'ids': np.array([1, 2], np.int32), 'x': [0.5], 'label': 3}\n"
        "def endless():\n"
        "    while True: yield {'ids': np.arange(3), 'labels': np.arange(3)}\n"
    )
    one, same, other = (load_dataset(f"{name}:{f}") for f in ("Data.one", "same", "other"))
    assert (one.kind, one.examples[0].label) == ("arrays", 3)
    np.testing.assert_array_equal(one.examples[0].arrays["ids"], [1, 2])
    assert one.sha256 == same.sha256 != other.sha256
    endless = load_dataset(f"{name}:endless", limit=4)
    assert len(endless) == 4
    assert list(endless.examples[0].arrays) == ["ids", "labels"]


def test_a_function_yields_pairs_and_words(module):
    name = module(
        "def pairs(): return [{'text': 'a', 'text_pair': 'b', 'label': 0.5}]\n"
        "def words(): return [{'words': ['a', 'b'], 'tags': ('O', 'O')}]\n"
    )
    assert list(load_dataset(f"{name}:pairs")) == [E("a", "b", 0.5)]
    assert list(load_dataset(f"{name}:words")) == [E(words=("a", "b"), tags=("O", "O"))]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "no examples"),
        ("return 5", "f failed: TypeError: 'int' object is not iterable"),
        ("return 'text'", "f failed: TypeError: it returned one example"),
        ("return {'ids': [1]}", "f failed: TypeError: it returned one example"),
        ("raise KeyError('x')", "f failed: KeyError: 'x'"),
        ("yield 'a'; raise OSError('gone')", "f failed: OSError: gone"),
        ("yield 'a'; yield 5", "f example 2: expected str or a dict by name, found int 5"),
        ("yield {1: 2}", "f example 1: expected str or a dict by name"),
        ("yield {}", "f example 1: expected text, or arrays of numbers"),
        ("yield {'label': 1}", "f example 1: expected text, or arrays of numbers"),
        ("yield {'x': object()}", "f example 1: expected text, or arrays of numbers"),
        ("yield {'x': [[1], [2, 3]]}", "f failed: ValueError"),
        ("yield {'text': 'a', 'lable': 1}", "f example 1: unknown key 'lable'"),
        ("yield {'text': 'a', 'label': None}", "f example 1: empty label"),
        ("yield 'a'; yield {'x': [1]}", "mixed kinds of examples: text (example 1) and arrays (example 2)"),
    ],
)
def test_a_function_that_fails_is_an_input_error(module, body, message):
    name, path = module(f"def f():\n    {body}\n"), list(sys.path)
    with pytest.raises(InputError) as caught:
        load_dataset(f"{name}:f")
    assert message in caught.value.message
    assert caught.value.next_step
    assert sys.path == path


def test_a_function_that_is_not_there_is_an_input_error(module):
    name = module("def batches(): pass\nvalue = 3\n")
    for spec, message in [
        (f"{name}:batchs", "has no 'batchs'"),
        (f"{name}:value", "'int' object is not callable"),
        ("no_such_module_here:f", "No module named"),
    ]:
        with pytest.raises(InputError, match=message):
            load_dataset(spec)


def test_a_function_with_a_syntax_error_in_its_module_is_an_input_error(module):
    with pytest.raises(InputError, match="SyntaxError"):
        load_dataset(f"{module('def f(:')}:f")


# --- parts and labels ---


def dataset(labels):
    return Dataset(tuple(E(str(n), label=label) for n, label in enumerate(labels)), "text", "d.tsv", "0" * 64)


def test_head_and_sample_keep_order_and_never_repeat():
    whole = dataset(range(50))
    assert whole.head(3) == dataset(range(3))
    assert whole.head(99) == whole.sample(99, 0) == whole
    assert len(whole.head(0)) == len(whole.sample(0, 1)) == len(whole.head(-1)) == 0
    drawn = [e.label for e in whole.sample(10, seed=7)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == [e.label for e in whole.sample(10, seed=7)]
    assert drawn != [e.label for e in whole.sample(10, seed=8)]
    assert set(drawn) < {e.label for e in whole.sample(20, seed=7)}
    assert whole.sample(10, 7).sha256 == whole.sha256


def test_sample_is_the_same_everywhere():
    assert [e.label for e in dataset(range(20)).sample(4, seed=0)] == [4, 7, 15, 18]


@pytest.mark.parametrize(
    ("labels", "id2label", "wanted"),
    [
        ([0, 1, 2], None, [0, 1, 2]),
        (["0", " 1 ", "2"], None, [0, 1, 2]),
        ([1.0, "2.0"], None, [1, 2]),
        (["negative", "POSITIVE", "Neutral"], {0: "Negative", 1: "positive", 2: "NEUTRAL"}, [0, 1, 2]),
        (["1", "3"], {0: "1", 1: "2", 2: "3"}, [0, 2]),  # names come first: stars, not ids
        (["a", "A"], {0: "A", 1: "a"}, [1, 0]),
        (["STRASSE"], {0: "x", 1: "straße"}, [1]),
        (["LABEL_2", 1], {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, [2, 1]),
        (["b"], {"0": "a", "1": "b"}, [1]),  # config.json has strings as keys
        ([], None, []),
    ],
)
def test_labels_to_ids(labels, id2label, wanted):
    found = labels_to_ids(dataset(labels), id2label, 3)
    assert found.dtype == np.int64
    assert found.tolist() == wanted


@pytest.mark.parametrize("label", [3, -1, "3", "-1", "1.5", 0.5, "neg", "nan", "1_0", "1e999"])
def test_labels_that_the_model_does_not_know_are_named(label):
    with pytest.raises(InputError) as caught:
        labels_to_ids(dataset([0, label]), {0: "sad", 1: "happy"}, 3)
    assert caught.value.message == f"d.tsv example 2: unknown label '{label}'; the model knows 0 sad, 1 happy"
    with pytest.raises(InputError, match="the model knows 0 to 2"):
        labels_to_ids(dataset([label]), None, 3)


def test_a_missing_label_is_refused():
    with pytest.raises(InputError, match=r"d\.tsv example 2: no label"):
        labels_to_ids(dataset([0, None]), None, 3)
    with pytest.raises(InputError, match=r"d\.tsv example 2: expected a number as the score, found 'None'"):
        labels_to_scores(dataset([0, None]))


def test_labels_to_scores():
    found = labels_to_scores(dataset(["5.000", 2, 0.25]))
    assert (found.dtype, found.tolist()) == (np.float64, [5.0, 2.0, 0.25])
    for label in ("high", "inf", ""):
        with pytest.raises(InputError, match="expected a number"):
            labels_to_scores(dataset([label]))


# --- data that needs no download ---


def test_standard_library_docstrings_are_even_clean_and_the_same_every_time():
    before = set(sys.modules)
    found = standard_library_docstrings(200)
    assert set(sys.modules) == before
    assert found == standard_library_docstrings(200)
    assert found.name == f"stdlib-docstrings-{sys.version_info.major}.{sys.version_info.minor}"
    assert (found.kind, len(found)) == ("text", 200)
    counts = Counter(e.label for e in found)
    assert len(counts) >= 15
    assert max(counts.values()) - min(counts.values()) <= 1
    texts = [e.text for e in found]
    assert len(set(texts)) == len(texts)
    assert all(40 <= len(text) <= 400 and text == " ".join(text.split()) for text in texts)


def test_standard_library_docstrings_give_all_there_is_at_most():
    every = standard_library_docstrings(10**6)
    counts = Counter(e.label for e in every)
    assert 500 < len(every) < 10_000
    assert min(counts.values()) >= 12
    assert every.head(30).examples == standard_library_docstrings(30).examples
    for limit in (0, -1):
        with pytest.raises(InputError):
            standard_library_docstrings(limit)


def test_standard_library_docstrings_without_sources_is_an_input_error(monkeypatch, tmp_path):
    broken = tmp_path / "json.py"
    broken.write_text("def f(:")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="no examples"):
        standard_library_docstrings(10)
