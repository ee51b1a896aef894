"""Rows from every kind of source, labels that are names or 0..K-1, and a line for what is wrong."""

import csv
import datetime
import gzip
import json
import math
import sys
from pathlib import Path

import pytest

from geolora.errors import DataError, DataWarning
from geolora.tasks.rows import class_names, classes, column, numbers, read_rows

ROWS = [{"text": "fine", "label": 1}, {"text": "", "label": 0}]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", "--train") == ROWS
    parquet.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="must have rows"):
        read_rows(tmp_path / "b.parquet", "--train")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"c.parquet cannot be read: [^\n]+$"):
        read_rows(tmp_path / "c.parquet", "--train")


@pytest.mark.parametrize(
    "source, asked",
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:sst2:train[:100]", ("owner/name", "sst2", "train[:100]")),
    ],
)
def test_hub_sets(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple) -> None:
    import datasets

    seen = []

    def load(name: str, config: str | None, split: str) -> list:
        seen.append((name, config, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(source, "--train") == ROWS
    assert seen == [asked]
    read_rows("owner/name", "--eval")
    assert seen[-1] == ("owner/name", None, "validation")


def test_a_hub_set_without_network_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^`--train`: no file o/n.* as a data set of the hub [^\n]+$"
    ):
        read_rows("o/n", "--train")


def test_a_misspelt_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="must be a file.*Did you mean `train.jsonl`"):
        read_rows("data/train.json", "--train")


@pytest.mark.parametrize("shape", ["zeros", "one value for all rows", "nothing in many rows"])
def test_a_parquet_that_unpacks_to_gigabytes(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed, in a dictionary, or as rows of nothing: a few kilobytes on disk."""
    pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import parquet

    columns: dict = {
        "zeros": {"text": ["0" * 2**20] * 8},
        "one value for all rows": {
            "text": pa.DictionaryArray.from_arrays([0] * 5000, ["0" * 4000])
        },
        "nothing in many rows": {"text": pa.nulls(200_000)},
    }[shape]
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2**16
    monkeypatch.setattr("geolora.files.reading.ALWAYS_UNPACKED", 2**20)
    with pytest.raises(
        DataError, match=r"unpacks to more than a hundred times its size\. Write it"
    ):
        read_rows(tmp_path / "a.parquet", "--train")


def test_a_torn_gz_is_one_line(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(("\n".join(json.dumps(r) for r in ROWS * 500)).encode()))
    whole[40:60] = bytes(20)
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read: [^\n]+$"):
        read_rows(tmp_path / "a.jsonl.gz", "--train")


def test_a_real_data_set_object_is_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert read_rows("owner/name", "--train") == ROWS


def test_what_needs_datasets_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geolora.tasks.rows.find_spec", lambda _: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in (str(tmp_path / "a.parquet"), "owner/name"):
        with pytest.raises(
            DataError,
            match=r"^`--train`: .* need the package `datasets`. Run: pip install 'datasets>=3'.$",
        ):
            read_rows(source, "--train")


@pytest.mark.parametrize(
    "labels, known",
    [
        ([0, 1, 1, 0], ["0", "1"]),
        (["2", "0", "1"], ["0", "1", "2"]),
        ([10, *range(10)], [str(i) for i in range(11)]),
        (["yes", "no"], ["no", "yes"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_names_and_whole_ranges_are_classes(labels: list, known: list) -> None:
    assert class_names(labels, labels[:1], "label") == known


@pytest.mark.parametrize(
    "labels, shown",
    [
        ([1, 2], "1, 2"),
        ([0, 2, 1, 4], "0, 1, 2, 4"),
        ([-1, 0, 1], "-1, 0, 1"),
        ([0.5, 1.0], "0.5, 1.0"),
        (["0", "1", "yes"], "0, 1, yes"),
        (range(1, 9), "1, 2, 3, 4, …"),
    ],
)
def test_other_numbers_are_not(labels: list, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        class_names(labels, [], "label")
    assert f"must hold names or 0..K-1 without gaps; got {shown}. Renumber" in str(caught.value)


def test_reading_files_does_not_need_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    before = "datasets" in sys.modules
    assert read_rows(tmp_path / "a.jsonl", "--train") == ROWS
    assert ("datasets" in sys.modules) == before


# ---- files that would lose rows or values -------------------------------------------------------

MANY = "".join(f"film {i},{i % 2}\n" for i in range(32))


def read(folder: Path, name: str, content: str | bytes) -> list:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(folder / name, "--train")


@pytest.mark.parametrize(
    "content, line",
    [
        ('text,label\n"so good,1\n' + MANY, "line 2 is not CSV: the text that a quote begins has no end"),
        ('text,label\n"so good,1\n' + MANY + '"bad,0\n' + MANY, "line 2 is not CSV: .*(line 35); a quote inside"),
        ('text,label\n"a \\"fine\\" film",1\n', "line 2 is not CSV: a text in quotes goes on"),
        ('"text,label\nfine,1\n', "line 1 is not CSV"),
        ("text,label,label\nfine,1,0\n", "two columns have the name 'label'"),
        ("text,label\nfine,1\ntext,label\nbad,0\n", "row 2 (line 3) is the header again"),
        ("text,label\nfine,1\ngood, not bad,0\n", "row 2 (line 3) has 3 fields, the header 2"),
        ('text,label\n"two\nlines",1\nbad\n', "row 2 (line 4) has 1 fields, the header 2"),
    ],
)  # fmt: skip
def test_a_csv_row_that_would_be_lost_is_named(tmp_path: Path, content: str, line: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.csv", content)
    assert str(caught.value).startswith(f"`--train`: {tmp_path / 'a.csv'} cannot be read: ")
    assert all(part in str(caught.value) for part in line.split(".*"))


def test_rows_inside_a_text_are_told(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match=r"row 2 \(line 3\) has a text of several lines that look"):
        read(tmp_path, "a.csv", 'text,label\nfine,1\n"Good,1\nbad,0\nit has 5",0\n' + MANY)
    with pytest.warns(DataWarning, match="row 1 "):
        read(tmp_path, "b.csv", 'label,text\n1,"Good\n0,bad\n1,a 5"\n0,bad\n')


def test_csv_as_it_ought_to_be_is_read_as_before(tmp_path: Path) -> None:
    text = 'text,label\n"Dear film,\nthanks, ""bye""",1\n\nhe said "no",0\n5" screen,1\n'
    assert [row["text"] for row in read(tmp_path, "a.csv", text)] == [
        'Dear film,\nthanks, "bye"', 'he said "no"', '5" screen',
    ]  # fmt: skip
    limit = csv.field_size_limit()
    assert read(tmp_path, "b.csv", f"text,label\n{'x' * 200_000},1\n")[0]["text"] == "x" * 200_000
    assert csv.field_size_limit() == limit, "of the whole process, and so put back"
    assert (
        read(tmp_path, "c.csv", "text,,\nfine,,\n")[0]["text"] == "fine"
    )  # as spreadsheets end rows
    assert len(read(tmp_path, "d.csv", "text\nfine\ntext\n")) == 2


@pytest.mark.parametrize(
    "content, line",
    [
        ('{"text": "a"}\n{"text": "fine", "label": 1, "text": "bad"}', "line 2: the key 'text' stands twice. Remove one"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "line 1: the key 'role' stands twice"),
        ("[" * 100_000, "line 1 is not JSON (maximum recursion depth exceeded"),
        ('{"a":' * 100_000, "line 1 is not JSON (maximum recursion depth exceeded"),
        ('{"a": ' + "9" * 5000 + "}", "line 1 is not JSON (Exceeds the limit"),
        ('{"text": "a"}\n{"text": "\\ud83d film"}', r"line 2 has half of a character, \ud83d"),
        ('{"text": ["a", "\\uDE00"]}', r"line 1 has half of a character, \ude00"),
        ('{"\\ud83d": "a"}', r"line 1 has half of a character, \ud83d"),
    ],
)  # fmt: skip
def test_a_json_line_that_cannot_be_meant_is_named(tmp_path: Path, content: str, line: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.jsonl", content)
    assert line in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_byte_order_mark_and_whole_characters_are_read(tmp_path: Path) -> None:
    rows = [{"text": "😀 ä \\ud83d"}]
    assert read(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()) == rows
    zipped = gzip.compress(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode())
    assert read(tmp_path, "a.jsonl.gz", zipped) == rows


def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KB of gzip hold 64 MB: no more of it is read than a line may have."""
    with pytest.raises(DataError, match=r"line 2 has more than 33,554,432 characters"):
        read(tmp_path, "a.jsonl.gz", gzip.compress(b"{}\n" + b"x" * 2**26))
    with monkeypatch.context() as small:
        small.setattr("geolora.files.reading.ALWAYS_UNPACKED", 2**16)
        with pytest.raises(DataError, match=r"its size \(line 1,009\). Unpack it first"):
            read(tmp_path, "a.jsonl.gz", gzip.compress(b"\n" * 2**16))
    monkeypatch.setattr("geolora.tasks.csv_rows.LONGEST_LINE", 100)
    assert len(read(tmp_path, "b.jsonl", '{"text": "' + "a" * 80 + '"}\n')) == 1
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(DataError, match="line 1 has more than 100 characters"):
            read(tmp_path, name, "x" * 101 + "\n")


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_arrays([pa.array([1]), pa.array([0])], names=["label", "label"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns have the name 'label'"):
        read_rows(tmp_path / "a.parquet", "--train")


@pytest.mark.parametrize("silent", [True, False])
def test_progress_bars_are_as_they_were(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    import datasets

    (datasets.disable_progress_bars if silent else datasets.enable_progress_bars)()
    seen = []

    def load(*_: object, **__: object) -> list:
        seen.append(datasets.are_progress_bars_disabled())
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="no network"):
        read_rows("owner/name", "--train")
    assert seen == [True]
    assert datasets.are_progress_bars_disabled() == silent


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, shown",
    [
        (["joy", "film"], "['joy', 'film']"), ([0, 1], "[0, 1]"), ({"name": "joy"}, "{'name': 'joy'}"),
        ((0.0, 1.0), "(0.0, 1.0)"), (math.nan, "nan"), (math.inf, "inf"), (b"joy", "b'joy'"),
        (datetime.date(2020, 1, 1), "datetime.date(2020, 1, 1)"), (None, "None"), ("", "''"),
        (["x"] * 10_000, "…"), (10**4000, "1000"),
    ],
)  # fmt: skip
def test_a_label_names_one_class(value: object, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        classes(["joy", value], "label", "train.jsonl")
    line = str(caught.value)
    assert "`--label`: column `label` must hold one name or number per row; row 2 of tr" in line
    assert shown in line
    assert len(line) < 300
    assert line.endswith("place of its 1.") == isinstance(value, list | tuple | dict)
    with pytest.raises(DataError, match="must hold names or numbers; got"):
        class_names(["joy", "fear", value], [], "label")
    with pytest.raises(DataError, match="must hold names or numbers; got"):
        class_names(["joy", "fear"], [value], "label")


def test_a_class_is_the_same_however_its_number_is_written() -> None:
    assert classes([0, 0.0, "0", "0.0", "0.", -0.0, 1.0, "1.00"], "label", "x") == [
        *["0"] * 6, "1", "1",
    ]  # fmt: skip
    train, held_out = classes(["0.0", "1.0"], "label", "x"), classes([1, 0], "label", "y")
    assert class_names(train, held_out, "label") == ["0", "1"]
    assert classes([True, False, "007", "1e3", "v1.0", 0.5], "label", "x") == [
        "True", "False", "007", "1e3", "v1.0", "0.5",
    ]  # fmt: skip


@pytest.mark.parametrize("odd", ["nan", "NaN", "inf", "Infinity", "-inf", "1_000", "٣"])
def test_words_that_python_takes_for_numbers_name_classes(odd: str) -> None:
    assert set(class_names(["word", odd], [odd], "label")) == {"word", odd}


@pytest.mark.parametrize("value", [1e30, "1e30", -1e17, 10**30])
def test_a_number_that_float32_cannot_square_is_refused(value: object) -> None:
    assert numbers([1e16, -1e16, "2", 3], "score", "x") == [1e16, -1e16, 2.0, 3.0]
    with pytest.raises(DataError, match=r"up to 1e\+16.*row 2 of x has .*Scale the column"):
        numbers([1, value], "score", "x")


@pytest.mark.parametrize("value", [10**4000, [1.0], {"a": 1}, None, "nan", "x" * 9999])
def test_what_is_no_number_is_refused_in_a_short_line(value: object) -> None:
    with pytest.raises(DataError, match="must hold finite numbers; row 1 of x has") as caught:
        numbers([value], "score", "x")
    assert len(str(caught.value)) < 300


def test_of_ten_thousand_columns_ten_are_shown() -> None:
    row = {f"column {i:05}": 1 for i in range(10_000)}
    with pytest.raises(DataError) as caught:
        column([row], "colunm 00007", "--text", "x.csv")
    line = str(caught.value)
    assert "it has column 00000, column 00001, " in line
    assert line.endswith("and 9,990 more. Did you mean `column 00007`?")
    assert len(line) < 400
    with pytest.raises(DataError, match="it has x{59}….{14}, y") as caught:
        column([{"x" * 100_000: 1, "y": 1}], "text", "--text", "x.csv")
    assert len(str(caught.value)) < 200
