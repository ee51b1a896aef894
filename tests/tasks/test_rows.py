"""Rows from every kind of source, labels that are names or 0..K-1, and a line for what is wrong."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from geolora.errors import DataError
from geolora.tasks.rows import class_names, read_rows

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
            DataError, match=r"need the package `datasets`. Install geolora\[data\]"
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
