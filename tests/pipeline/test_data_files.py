# SPDX-License-Identifier: Apache-2.0
"""Every form of data file, written here and read back, and every way in which such a file can be broken."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError, MissingDependency
from onnxpress.pipeline.data import Example, load_dataset

E = Example


@pytest.fixture
def load(tmp_path):
    """Write `content` to a file and load it."""

    def write_and_load(name, content, query="", **kwargs):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_dataset(f"{path}{query}", **kwargs)

    return write_and_load


FORMS = [
    ("a.tsv", "good film\t1\nbad\t0\n", "", [E("good film", label="1"), E("bad", label="0")]),
    ("a.tsv", "a\tb\t4.5\n", "", [E("a", "b", "4.5")]),
    ("a.tsv", '"quoted\t"\n', "", [E('"quoted', label='"')]),
    ("a.tsv", "\ufeffa\t1\r\nb\t0\r\n\r\n", "", [E("a", label="1"), E("b", label="0")]),
    ("a.tsv", "a\u2028b\x85c\x0bd\t1", "", [E("a\u2028b\x85c\x0bd", label="1")]),
    ("a.tsv", "\t1\n", "", [E("", label="1")]),
    ("a.tsv", "sentence\tlabel\na\t1\n", "", [E("sentence", label="label"), E("a", label="1")]),
    ("a.tsv", "sentence\tlabel\na\t1\n", "?header=yes", [E("a", label="1")]),
    ("a.tsv", "t\tc\tx\na\t1\t2\n", "?text=x&label=t", [E("2", label="a")]),
    ("a.tsv", "a\t1\t2\n", "?text=3&label=2", [E("2", label="1")]),
    ("a.TSV", "a\t1\n", "", [E("a", label="1")]),
    ("a.csv", "x\t5\ta\tb\ny\t4\tc\td\textra\n", "?format=tsv&text=3&pair=4&label=2&extra=ignore", None),
    ("a.csv", "label,text\r\n1,a\r\n0,b\r\n", "", [E("a", label="1"), E("b", label="0")]),
    ("a.csv", 'sentence,label\n"a, ""b""\nc",1\n', "", [E('a, "b"\nc', label="1")]),
    ("a.csv", "sentence1,sentence2,score\na,b,0.5\n", "", [E("a", "b", "0.5")]),
    ("a.csv", "text\na\n", "", [E("a")]),
    ("a.csv", "title,body,class\na,b,1\n", "?text=title&pair=body&label=class", [E("a", "b", "1")]),
    ("a.csv", "title,body,class\na,b,1\n", "?text=title", [E("a")]),
    ("a.csv", "my title,x&y\na,1\n", "?text=my%20title&label=x%26y", [E("a", label="1")]),
    ("a.csv", "q,c,a\nwho?,he did,he\n", "?text=q&context=c&label=a", [E("who?", label="he", context="he did")]),
    ("a.csv", "\ufefftext,label\na,1\n", "", [E("a", label="1")]),
    ("a.csv", '"3","a b","c"\n', "?header=no&text=2&label=1", [E("a b", label="3")]),
    ("a.csv", "a,1\n", "?header=no", [E("a", label="1")]),
    (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"label": 0.5, "text": "\\u00e9"}\n',
        "",
        [E("a", label=1), E("é", label=0.5)],
    ),
    ("a.jsonl", '{"text": "a", "label": true}\r\n', "", [E("a", label=1)]),
    ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": "yes"}', "", [E("a", "b", "yes")]),
    ("a.jsonl", '{"t": "a", "c": 2, "u": null}', "?text=t&label=c", [E("a", label=2)]),
    ("a.jsonl", '{"id": 1, "tokens": ["a", "b"], "ner_tags": [0, 3]}', "", [E(words=("a", "b"), tags=("0", "3"))]),
    ("a.jsonl", '{"w": ["a"], "t": ["O"]}', "?words=w&tags=t", [E(words=("a",), tags=("O",))]),
    ("a.jsonl", '{"text": "a b", "tokens": ["a", "b"]}', "", [E("a b")]),
    ("a.txt", "one\n\n two \r\n", "", [E("one"), E(" two ")]),
    ("a.tokens", "one\n", "?format=txt", [E("one")]),
]


@pytest.mark.parametrize(("name", "content", "query", "wanted"), FORMS)
def test_forms(load, name, content, query, wanted):
    found = load(name, content, query)
    assert list(found) == (wanted or [E("a", "b", "5"), E("c", "d", "4")])
    assert found.name == name
    assert found.sha256 == hashlib.sha256(content.encode()).hexdigest()
    first = found.examples[0]
    assert found.kind == ("words" if first.words else "pairs" if first.text_pair is not None else "text")


CONLL = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\n# x y O\n"


@pytest.mark.parametrize("name", ["a.conll", "eng.testa", "a.iob2"])
@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_conll_takes_the_first_column_and_the_last_and_skips_document_marks(load, name, separator):
    if name == "eng.testa" and separator == "\t":
        name = "a.conll"
    found = load(name, CONLL.replace(" ", separator))
    assert list(found) == [E(words=("EU", "rejects"), tags=("I-ORG", "O")), E(words=("#",), tags=("O",))]
    assert found.kind == "words"


def test_conll_keeps_words_with_a_no_break_space_and_reads_crlf(load):
    assert list(load("a.conll", "10\u00a0000 O\r\n\r\nb O")) == [
        E(words=("10\u00a0000",), tags=("O",)),
        E(words=("b",), tags=("O",)),
    ]


BROKEN = [
    ("a.tsv", "a\t1\nb\n", "", "a.tsv line 2: expected 2 columns, found 1"),
    ("a.tsv", "a\t1\nb\t1\t2\n", "", "a.tsv line 2: expected 2 columns, found 3"),
    ("a.tsv", "a\t1\n\nb\t1\n", "", "a.tsv line 2: expected 2 columns, found 1"),
    ("a.tsv", "a\t1\nb\t\n", "", "a.tsv line 2: empty label"),
    ("a.tsv", "a\t1\nb\t \n", "", "a.tsv line 2: empty label"),
    ("a.tsv", "a\n", "", "a.tsv line 1: expected 2 columns (text, label) or 3 (text, text, label), found 1"),
    ("a.tsv", "a\tb\tc\td\n", "", "a.tsv line 1: expected 2 columns (text, label) or 3 (text, text, label), found 4"),
    ("a.tsv", b"a\t1\nb\t1\n\xff\t1\n", "", "a.tsv line 3: not UTF-8 text"),
    ("a.tsv", "text\tlabel\n".encode("utf-16"), "", "a.tsv line 1: not UTF-8 text"),
    ("a.tsv", "a\t1\n", "?header=no&text=3", "a.tsv line 1: text=3 is not a column number from 1 to 2"),
    ("a.tsv", "a\t1\n", "?header=no&text=0", "a.tsv line 1: text=0 is not a column number from 1 to 2"),
    ("a.tsv", "a\t1\n", "?header=no&text=title", "a.tsv line 1: text=title is not a column number from 1 to 2"),
    ("a.tsv", "a\t1\nb\n", "?text=1&label=2&extra=ignore", "a.tsv line 2: expected 2 columns, found 1"),
    ("a.csv", 'text,label\na,1\n"x\ny",1\nb,1,2\n', "", "a.csv line 5: expected 2 columns, found 3"),
    ("a.csv", "text,label\na,1\n\nb,1\n", "", "a.csv line 3: expected 2 columns, found 0"),
    ("a.csv", 'text,label\na,1\n"b,1\nc,1\n', "", "a.csv line 3: broken CSV: unexpected end of data"),
    ("a.csv", 'text,label\n"a"b,1\n', "", "a.csv line 2: broken CSV: ',' expected after '\"'"),
    ("a.csv", "text,label\na,\n", "", "a.csv line 2: empty label"),
    ("a.csv", "title,class\na,1\n", "", "a.csv line 1: no text among the columns title, class"),
    ("a.csv", "title,class\na,1\n", "?text=titel", "a.csv line 1: no column 'titel'"),
    ("a.csv", "title,class\na,1\n", "?text=1", "a.csv line 1: no column '1'"),
    ("a.csv", "text,text,label\na,b,1\n", "", "a.csv line 1: two columns named 'text'"),
    ("a.csv", "text,label\n", "", "a.csv: no examples"),
    ("a.csv", "text\na\n", "?label=class", "a.csv: the mapping names no text"),
    ("a.csv", "text\na\n", "?txt=class", "a.csv: a csv file takes no 'txt'"),
    ("a.csv", "text\na\n", "?words=text", "a.csv: a csv file takes no 'words'"),
    ("a.csv", "text\na\n", "?text=", "a.csv: cannot read '?text='"),
    ("a.csv", "text\na\n", "?text", "a.csv: cannot read '?text'"),
    ("a.csv", "text\na\n", "?text=a&text=b", "a.csv: cannot read '?text=a&text=b'"),
    ("a.csv", "text\na\n", "?text=%ff", "a.csv: cannot read '?text=%ff'"),
    ("a.csv", "text\na\n", "?header=maybe", "a.csv: cannot read the query"),
    ("a.csv", "text\na\n", "?extra=keep", "a.csv: cannot read the query"),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "", "a.jsonl line 2: broken JSON: Expecting value"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}', "", "a.jsonl line 2: broken JSON: Expecting value"),
    ("a.jsonl", '{"text": "a"}\n["b"]', "", "a.jsonl line 2: expected a JSON object"),
    ("a.jsonl", '{"text": "\\ud83d"}', "", "a.jsonl line 1: broken JSON: 'utf-8' codec can't encode"),
    ("a.jsonl", "[" * 200_000, "", "a.jsonl line 1: broken JSON: maximum recursion"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "", "a.jsonl line 2: no 'label'"),
    ("a.jsonl", '{"text": "a", "label": null}', "", "a.jsonl line 1: empty label"),
    ("a.jsonl", '{"text": "a", "label": ""}', "", "a.jsonl line 1: empty label"),
    (
        "a.jsonl",
        '{"text": "a", "label": NaN}',
        "",
        "a.jsonl line 1: expected a name or a number as label, found float nan",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": [1]}',
        "",
        "a.jsonl line 1: expected a name or a number as label, found list [1]",
    ),
    ("a.jsonl", '{"text": 5}', "", "a.jsonl line 1: expected a string as text, found int 5"),
    ("a.jsonl", '{"text": "a"}\n{"text": null}', "", "a.jsonl line 2: expected a string as text, found nothing"),
    ("a.jsonl", '{"tokens": "a b"}', "", "a.jsonl line 1: expected a list of strings as words, found str a b"),
    ("a.jsonl", '{"tokens": [], "tags": []}', "", "a.jsonl line 1: 0 words but 0 tags"),
    ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "", "a.jsonl line 1: 2 words but 1 tags"),
    ("a.jsonl", '{"x": "a", "t": ["O"]}', "?text=x&tags=t", "a.jsonl line 1: tags without words"),
    ("a.conll", "a O\nb\n", "", "a.conll line 2: expected 2 columns, found 1"),
    ("a.conll", "a X O\nb O\n", "", "a.conll line 2: expected 3 columns, found 2"),
    ("a.conll", "a\n", "", "a.conll line 1: expected 2 columns, found 1"),
    ("a.conll", "-DOCSTART- O\n\n", "", "a.conll: no examples"),
    ("a.conll", "a O\n", "?text=1", "a.conll: a conll file takes no 'text'"),
    ("a.tsv", "", "", "a.tsv: no examples"),
    ("a.tsv", "\ufeff\r\n", "", "a.tsv: no examples"),
    ("a.jsonl", "", "", "a.jsonl: no examples"),
    ("a.txt", "\n \n", "", "a.txt: no examples"),
    ("a.xyz", "a\t1\n", "", "a.xyz: unknown kind of data file"),
    ("a.tsv", "a\t1\n", "?format=tvs", "a.tsv: unknown kind of data file"),
]


@pytest.mark.parametrize(("name", "content", "query", "message"), BROKEN)
def test_broken_files_are_refused_with_the_line_and_a_next_step(load, name, content, query, message):
    with pytest.raises(InputError) as caught:
        load(name, content, query)
    assert caught.value.message.startswith(message)
    assert caught.value.next_step


def test_next_steps_suggest_what_was_meant(load):
    for name, content, query, step in [
        ("a.csv", "title,class\na,1\n", "?text=titel", "Did you mean 'title'?"),
        ("a.csv", "title,class\na,1\n", "?text=1", "header=no"),
        ("a.csv", "text\na\n", "?txt=class", "Did you mean 'text'?"),
        ("a.tsv", "a\t1\nb\t1\t2\n", "?text=1", "extra=ignore"),
        ("a.xyz", "a", "", "a.xyz?format=F"),
    ]:
        with pytest.raises(InputError) as caught:
            load(name, content, query)
        assert step in caught.value.next_step


def test_a_missing_file_suggests_its_sibling(tmp_path):
    (tmp_path / "train.tsv").write_text("a\t1\n")
    (tmp_path / "notes.md").write_text("")
    for wrong, step in [
        ("trian.tsv", "Did you mean 'train.tsv'?"),
        ("zzz", "Known: train.tsv."),
        ("no/train.tsv", "There is no folder"),
        ("train.csv?text=a", "Did you mean 'train.tsv'?"),
    ]:
        with pytest.raises(InputError, match="no such data file") as caught:
            load_dataset(str(tmp_path / wrong))
        assert step in caught.value.next_step


@pytest.mark.parametrize("spec", ["", "a\0b.tsv", "x" * 5000 + ".tsv", "?text=a"])
def test_a_spec_that_is_no_path_is_refused(spec):
    with pytest.raises(InputError):
        load_dataset(spec)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load_dataset(str(tmp_path))


def test_a_file_name_may_hold_a_question_mark(load):
    assert list(load("a?b.txt", "x")) == [E("x")]


def test_huge_fields_are_accepted_and_the_csv_modules_limit_is_put_back(load):
    before, text = csv.field_size_limit(), "x" * 1_000_000
    assert load("a.csv", f"text,label\n{text},1\n").examples[0].text == text
    assert load("a.tsv", f"{text}\t1\n").examples[0].text == text
    with pytest.raises(InputError):
        load("a.csv", "text,label\na\n")
    assert csv.field_size_limit() == before


def test_a_limit_stops_reading(load):
    content = "a\t1\nb\t0\nbroken"
    assert list(load("a.tsv", content, limit=2)) == [E("a", label="1"), E("b", label="0")]
    assert load("a.tsv", content, limit=1).sha256 == hashlib.sha256(content.encode()).hexdigest()
    for limit in (0, -1):
        with pytest.raises(InputError, match="limit"):
            load("a.tsv", content, limit=limit)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t\ufeff"), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=6))
def test_tsv_csv_and_jsonl_give_back_what_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("forms")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("text", "label"), *rows])
    (folder / "a.csv").write_text(buffer.getvalue(), encoding="utf-8", newline="")
    (folder / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8", newline="")
    lines = (json.dumps({"text": a, "label": b}) + "\n" for a, b in rows)
    (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        assert list(load_dataset(str(folder / name))) == [E(a, label=b) for a, b in rows]


# --- parquet ---


def test_parquet_without_pyarrow_names_the_extra(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow") as caught:
        load("a.parquet", b"PAR1")
    assert caught.value.next_step == 'pip install "onnxpress[parquet]"'
    assert caught.value.exit_code == 5


def test_parquet_maps_columns_and_names_rows(load, monkeypatch):
    batches = [[{"t": "a", "c": 1}], [{"t": "b", "c": 0}, {"t": "c", "c": None}]]

    class ParquetFile:
        schema_arrow = SimpleNamespace(names=["c", "t", "u"])

        def __init__(self, source):
            if source.read() != b"PAR1":
                raise ValueError("no magic bytes")

        def iter_batches(self, columns):
            assert columns == ["c", "t"]
            return (SimpleNamespace(to_pylist=lambda rows=rows: rows) for rows in batches)

    package = ModuleType("pyarrow")
    package.parquet = SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    assert list(load("a.parquet", b"PAR1", "?text=t&label=c", limit=2)) == [E("a", label=1), E("b", label=0)]
    for content, query, message in [
        (b"PAR1", "?text=t&label=c", r"a\.parquet row 3: empty label"),
        (b"PAR1", "?text=x", "no column 'x'"),
        (b"", "?text=t", "broken parquet file: no magic bytes"),
    ]:
        with pytest.raises(InputError, match=message):
            load("a.parquet", content, query)


def test_parquet_itself(load, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"tokens": [["a", "b"], ["c"]], "tags": [["O", "B-X"], ["O"]], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "w.parquet")
    assert load_dataset(str(tmp_path / "w.parquet")).examples[0] == E(words=("a", "b"), tags=("O", "B-X"))
    with pytest.raises(InputError, match="broken parquet file"):
        load("a.parquet", b"PAR1")


# --- arrays ---


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_npz_rows_become_examples_without_a_batch_axis(load):
    ids, mask = np.arange(6).reshape(3, 2), np.ones(3, np.float16)
    found = load("a.npz", npz(ids=ids, mask=mask, labels=np.array([2, 0, 1], np.uint8)))
    assert (found.kind, len(found), [e.label for e in found]) == ("arrays", 3, [2, 0, 1])
    for row, example in enumerate(found):
        assert list(example.arrays) == ["ids", "mask"]
        np.testing.assert_array_equal(example.arrays["ids"], ids[row], strict=True)
        np.testing.assert_array_equal(example.arrays["mask"], np.array(1, np.float16), strict=True)
    assert type(found.examples[0].label) is int


def test_npz_arrays_and_label_can_be_chosen(load):
    content = npz(x=np.zeros((2, 3)), y=np.array(["cat", "dog"]), classes=np.zeros(5))
    found = load("a.npz", content, "?arrays=x&label=y")
    assert [(list(e.arrays), e.label) for e in found] == [(["x"], "cat"), (["x"], "dog")]
    assert load("a.npz", content, "?arrays=x", limit=1).examples[0].label is None


NPZ_BROKEN = [
    (npz(x=np.zeros((2, 3)), y=np.zeros(3)), "", "the first axes do not agree, or there is no input: x [2, 3], y [3]"),
    (npz(x=np.zeros((2, 3)), labels=np.zeros(3)), "", "the first axes do not agree"),
    (npz(labels=np.zeros(3)), "", "there is no input"),
    (npz(x=np.array(1.0)), "", "the first axes do not agree"),
    (npz(), "", "there is no input"),
    (npz(x=np.zeros((0, 3))), "", "no examples"),
    (npz(x=np.zeros(2), label=np.zeros((2, 2))), "", "row 1: expected a name or a number as label"),
    (npz(x=np.zeros(2)), "?arrays=z", "no array 'z'"),
    (npz(x=np.zeros(2)), "?label=z", "no array 'z'"),
    (npz(x=np.array([{}, {}])), "", "not an .npz of plain arrays: Object arrays cannot be loaded"),
    (b"\x80\x04N.", "", "not an .npz of plain arrays"),
    (b"", "", "not an .npz of plain arrays"),
    (b"text", "", "not an .npz of plain arrays"),
]


@pytest.mark.parametrize(("content", "query", "message"), NPZ_BROKEN)
def test_broken_npz_files_are_refused(load, content, query, message):
    with pytest.raises(InputError, match=r"a\.npz") as caught:
        load("a.npz", content, query)
    assert message in caught.value.message
    assert caught.value.next_step


def test_an_npy_file_under_another_name_is_refused(load):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with pytest.raises(InputError, match=r"not an \.npz"):
        load("a.npz", buffer.getvalue())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_npz_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    content = bytearray(npz(x=np.arange(8.0).reshape(2, 4)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(InputError):
        assert len(load_dataset(str(path))) > 0
