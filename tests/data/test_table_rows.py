"""Rows of tables: how messages name them, by the line of a text file or counted from 0, and the file."""

import io

import numpy as np
import pandas as pd
import polars as pl
import pytest

from pyro_vae.data import DataError, table
from pyro_vae.data.table_rows import records

NUMBERS = [20.5 + number for number in range(23)]
WITH_TEXT = [*NUMBERS[:7], "twenty", *NUMBERS[7:]]


def people(ages=WITH_TEXT):
    return pd.DataFrame({"age": ages, "note": ["a", "b"] * (len(ages) // 2)})


def message(source, **options):
    with pytest.raises(DataError) as error:
        table(source, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "frame",
    [people(), people().set_index(np.arange(100, 124)), pl.DataFrame(people().astype(str))],
    ids=["pandas", "another index", "polars"],
)
def test_a_row_of_a_frame_is_counted_from_0(frame):
    assert message(frame).startswith("column 'age' has 'twenty' in row 7 (counted from 0), where 23 of")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines, 9),
        (lambda lines: [*lines[:4], "", "   ", *lines[4:]], 11),
        (lambda lines: [lines[0], lines[1].replace(",a", ',"a\nb\nc"'), *lines[2:]], 11),
        (lambda lines: [line.replace(",", ", ") for line in lines], 9),
        (lambda lines: [line.replace(",", ";") for line in lines], 9),
        (lambda lines: ["," + lines[0], *(f"{place},{line}" for place, line in enumerate(lines[1:]))], 9),
    ],
    ids=["plain", "blank lines", "quoted ends of lines", "spaces", "semicolons", "an index"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_of_a_text_file_is_named_by_its_line_and_the_remedy_works(tmp_path, change, line, end):
    path = tmp_path / "people.csv"
    written = end.join(change(people().to_csv(index=False).splitlines())) + end
    path.write_bytes(written.encode())
    assert written.replace(end, "\n").split("\n")[line - 1].count("twenty") == 1
    found = message(path)
    assert found.startswith(f"{path}: column 'age' has 'twenty' in line {line}, where 23 of its 24 values")
    remedy = found.partition("by frame = ")[2].partition("; table(frame)")[0]
    names = {"pandas": pd}
    exec(f"frame = {remedy}", names)
    assert table(names["frame"]).values[:, 0].isnan().nonzero().tolist() == [[7]]


def test_other_files_are_named_too(tmp_path):
    path = tmp_path / "people.tsv"
    people().to_csv(path, sep="\t", index=False)
    assert message(path).startswith(f"{path}: column 'age' has 'twenty' in line 9, where")
    assert f"by frame = pandas.read_csv({str(path)!r}, sep='\\t'); frame['age'] = pandas" in message(path)
    assert message(path, drop=["size"]).startswith(f"{path}: the table has no column 'size'")
    path = tmp_path / "people.parquet"
    people([str(age) for age in WITH_TEXT]).to_parquet(path)
    assert message(path).startswith(f"{path}: column 'age' has 'twenty' in row 7 (counted from 0), where")
    assert f"frame = pandas.read_parquet({str(path)!r}); frame['age'] = pandas" in message(path)


def test_other_rows_of_the_same_columns_are_named_by_their_own_file(tmp_path):
    known = table(people([*NUMBERS, 9.5]))
    path = tmp_path / "others.csv"
    path.write_text("note,age\na,30.5\nc,31.5\n")
    with pytest.raises(DataError, match=r"others.csv: column 'note' has 'c' in line 3, which is not among"):
        known.tensor(path)
    path.write_text("note,age\na,30.5\nb,inf\n")
    with pytest.raises(DataError, match=r"others.csv: column 'age' has inf in line 3, where normal needs"):
        known.tensor(path)
    with pytest.raises(DataError, match=r"^column 'age' has inf in row 1 \(counted from 0\), where normal"):
        known.tensor(people([30.5, np.inf]))


def test_the_lines_of_a_text_table():
    text = 'a,b\r\n1,""\r\n\r\n"x\r\ny",2\r\n3,4'
    assert [line for line, _ in records(io.StringIO(text, newline=""), ",")] == [1, 2, 4, 6]
    assert list(records(io.StringIO('a\n\n""\n1\n'), ",")) == [(1, ["a"]), (3, [""]), (4, ["1"])]
