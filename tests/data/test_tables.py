"""Tables of mixed columns: proposals of families, values as numbers, and back to the same data frame."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from pyro_vae.data import DataError, table

N = 60
TOWNS, GRADES = ["Ulm", "Bonn", "Jena", "Kiel"], ["low", "mid", "top"]


def mixed():
    random = np.random.default_rng(0)
    eyes = random.choice(["blue", "brown", "green"], N)
    frame = pd.DataFrame(
        {
            "height": random.normal(170, 9, N),
            "income": np.exp(random.normal(10, 1, N)),
            "change": random.standard_t(2, N),
            "age": random.integers(18, 90, N),
            "children": random.poisson(1.3, N),
            "visits": random.negative_binomial(0.5, 0.1, N),
            "smokes": random.random(N) > 0.6,
            "sex": random.choice(["female", "male"], N),
            "parity": random.choice([1, 2], N),
            "eyes": eyes,
            "town": pd.Categorical(random.choice(TOWNS[:3], N), TOWNS),
            "grade": pd.Categorical(random.choice(GRADES, N), GRADES, ordered=True),
        },
        index=[f"row {number}" for number in range(N)],
    )
    frame.iloc[3, 0] = frame.iloc[4, 1] = np.nan
    frame.loc[["row 5", "row 6"], ["sex", "eyes", "town", "grade"]] = None
    frame = frame.astype({"children": "Int64"})
    frame.loc["row 7", "children"] = pd.NA
    return frame


FAMILIES = {
    "height": "normal",
    "income": "log-normal",
    "change": "student-t",
    "age": "normal",
    "children": "poisson",
    "visits": "negative-binomial",
    "smokes": "binary",
    "sex": "binary",
    "parity": "binary",
    "eyes": ("categorical", 3),
    "town": ("categorical", 4),
    "grade": ("ordinal", 3),
}


def test_the_families_that_are_proposed():
    found = table(mixed())
    assert dict(zip([column.name for column in found.columns], found.families, strict=True)) == FAMILIES
    shown = repr(found).splitlines()
    assert shown[0] == f"Table of {N} rows and 12 columns"
    assert shown[6].split() == ["children", "poisson", *shown[6].split()[2:-1], "1"]
    assert "two values, female and male" in repr(found)


def test_values_are_numbers_and_codes():
    frame = mixed()
    found = table(frame)
    assert found.values.dtype == torch.float64
    assert found.values.isnan().numpy().tolist() == frame.isna().to_numpy().tolist()
    for place, name in enumerate(frame):
        series = frame[name].dropna()
        values = found.values[:, place][~found.values[:, place].isnan()].numpy()
        levels = found.columns[place].levels
        if levels:
            assert [levels[int(value)] for value in values] == series.tolist()
        else:
            np.testing.assert_array_equal(values, series.to_numpy(float))
    assert found.columns[list(FAMILIES).index("town")].levels == ("Ulm", "Bonn", "Jena", "Kiel")


def test_units_are_those_of_the_present_values():
    frame = mixed()
    columns = {column.name: column for column in table(frame).columns}
    height, log_income = frame["height"].dropna(), np.log(frame["income"].dropna())
    assert columns["height"].offset == pytest.approx(height.mean(), rel=1e-12)
    assert columns["height"].scale == pytest.approx(height.std(ddof=0), rel=1e-12)
    assert columns["income"].offset == pytest.approx(log_income.mean(), rel=1e-12)
    assert columns["income"].scale == pytest.approx(log_income.std(ddof=0), rel=1e-12)
    assert (columns["visits"].offset, columns["visits"].scale) == (0, pytest.approx(frame["visits"].mean()))
    assert (columns["eyes"].offset, columns["eyes"].scale) == (0, 1)
    constant = table(pd.DataFrame({"a": [0.1, 0.1, 0.1]})).columns[0]
    assert (constant.family, constant.scale) == ("normal", 1)


def test_a_frame_comes_back_with_its_types():
    frame = mixed()
    found = table(frame)
    pd.testing.assert_frame_equal(found.frame(found.values, index=found.index), frame)
    part = found.frame(found.values[:5].numpy())
    assert list(part.index) == [0, 1, 2, 3, 4]
    assert part.dtypes.tolist() == frame.dtypes.tolist()


def test_holes_in_columns_of_integers_and_booleans_come_back_as_holes():
    frame = pd.DataFrame({"a": [3, 1, 2, 0], "b": [True, False, True, True], "c": [7, 9, 7, 9]})
    found = table(frame)
    values = found.values.clone()
    values[1] = torch.nan
    back = found.frame(values)
    assert back.isna().all(axis=1).tolist() == [False, True, False, False]
    assert back.dropna().to_numpy().tolist() == frame.drop(index=1).to_numpy().tolist()


def test_whole_numbers_that_a_type_cannot_hold_keep_their_value():
    found = table(pd.DataFrame({"n": np.array([3, 250, 9], np.uint8)}))
    assert found.frame(np.array([[-2.0], [250.0]]))["n"].tolist() == [-2, 250]
    assert found.frame(np.array([[300.0]]))["n"].tolist() == [300]
    assert found.frame(found.values)["n"].dtype == np.uint8


def test_whole_numbers_with_holes_stay_whole():
    frame = pd.DataFrame({"age": [31.0, np.nan, 48.0, 25.0]})
    found = table(frame)
    assert found.frame(np.array([[30.6], [np.nan]]))["age"].tolist()[0] == 31.0


def test_an_imputation_has_means_and_the_most_frequent_levels():
    frame = pd.DataFrame({"x": [0.5, 1.5, 2.7, 1.0], "n": [0, 3, 1, 2], "c": ["a", "b", "c", "a"]})
    found = table(frame)

    class Imputed:
        mean = torch.tensor([[0.5, 1.4, 1.2]]).double()
        draws = torch.tensor([[0.1, 0.0, 2.0], [0.9, 3.0, 0.0], [0.2, 1.0, 2.0]])[:, None].double()

    assert found.frame(Imputed).to_numpy().tolist() == [[0.5, 1, "c"]]


def test_other_rows_have_the_same_codes():
    frame = mixed()
    found = table(frame)
    others = frame.iloc[[9, 5, 2]][list(reversed(frame.columns))].assign(extra="x")
    assert torch.equal(found.tensor(others).nan_to_num(-9), found.values[[9, 5, 2]].nan_to_num(-9))
    with pytest.raises(
        DataError, match=r"column 'eyes' has 'grey' in row 1 \(counted from 0\), .* its 3 levels"
    ):
        found.tensor(frame.assign(eyes=["blue", "grey"] + ["blue"] * (N - 2)))
    with pytest.raises(DataError, match="no column 'sex'; it has height"):
        found.tensor(frame.drop(columns="sex"))
    with pytest.raises(DataError, match="column 'age' holds .*, where normal needs numbers"):
        found.tensor(frame.assign(age="old"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", "; .csv"])
def test_files(tmp_path, suffix):
    frame = mixed().reset_index(drop=True)
    path = tmp_path / f"x{suffix[-4:] if suffix != '.parquet' else suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep={".tsv": "\t", "; .csv": ";"}.get(suffix, ","), index=False, na_rep="NA")
    expected = table(frame.astype({"town": "str", "grade": "str"}))
    found = table(path, families={"town": "categorical"})
    if suffix == ".parquet":
        assert found.families == list(FAMILIES.values())
    else:
        assert found.families == expected.families
        assert torch.equal(found.values.nan_to_num(-9), expected.values.nan_to_num(-9))


def test_text_files_of_others(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("\ufeff,a,b\r\n0,1.5,x\r\n1,?,y\r\n2,2.25,null\r\n3,0.5,\r\n".encode())
    found = table(path)
    assert [column.name for column in found.columns] == ["a", "b"]
    assert list(found.index) == [0, 1, 2, 3]
    assert found.values.isnan().tolist() == [[False, False], [True, False], [False, True], [False, True]]


def test_frames_of_polars():
    frame = pl.DataFrame({"a": [0.5, None, 2.0, 1.25], "b": ["x", "y", None, "z"]})
    found = table(frame)
    assert found.families == ["normal", ("categorical", 3)]
    assert found.values.isnan().tolist() == [[False, False], [True, False], [False, True], [False, False]]


def test_families_by_name():
    frame = mixed()
    found = table(
        frame, families={"age": "counts", "visits": "poisson", "parity": "normal", "grade": "categorical"}
    )
    by_name = {column.name: (column.family, column.reason) for column in found.columns}
    assert by_name["age"][0] == "negative-binomial"
    assert by_name["visits"] == ("poisson", "asked for")
    assert by_name["parity"][0] == "normal"
    assert by_name["grade"][0] == "categorical"
    ratings = table(pd.DataFrame({"stars": [5, 3, 4, 1, 3]}), families={"stars": "ordinal"})
    assert ratings.families == [("ordinal", 4)]
    assert ratings.columns[0].levels == (1, 3, 4, 5)
    assert ratings.frame(ratings.values)["stars"].tolist() == [5, 3, 4, 1, 3]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"families": {"hight": "normal"}}, "no column 'hight'; it has height, income"),
        ({}, {"drop": ["hight"]}, "no column 'hight'"),
        ({}, {"families": {"age": "gaussian"}}, r"families\['age'\] must be one of counts, normal"),
        (
            {},
            {"families": {"height": "counts"}},
            r"column 'height' has .* in row 0 \(counted from 0\), where poisson needs",
        ),
        (
            {},
            {"families": {"change": "log-normal"}},
            "'change' has -.* needs positive numbers: .*family",
        ),
        ({}, {"families": {"eyes": "binary"}}, "column 'eyes' has 3 different values, which binary"),
        ({}, {"families": {"eyes": "normal"}}, "column 'eyes' holds .*, where normal needs numbers"),
        ({"age": np.nan}, {}, r"column 'age' has no values: leave it out, by drop=\['age'\]"),
        ({"age": pd.Timestamp("2020-01-01")}, {}, "column 'age' holds datetime64.*: make it a number"),
        (
            {"age": [f"name {n}" for n in range(N)]},
            {},
            r"'age' is text with 60 values in 60 rows.*drop=\['age'\]",
        ),
        ({"age": [np.inf] + [1.5, 2.5, 3.5] * 19 + [1, 2]}, {}, r"column 'age' has inf in row 0 \(counted"),
    ],
)
def test_what_is_wrong_is_said_by_column(change, options, message):
    with pytest.raises(DataError, match=message):
        table(mixed().assign(**change), **options)


def test_remedies_work():
    frame = mixed().assign(name=[f"name {n}" for n in range(N)])
    assert len(table(frame, drop=["name"]).columns) == 12
    assert table(frame, families={"name": "categorical"}).families[-1] == ("categorical", N)


def test_what_is_not_a_table(tmp_path):
    with pytest.raises(TypeError, match="a data frame, or the path of a file; got ndarray"):
        table(np.zeros((2, 2)))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        table(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"must end in .csv, .tsv or .parquet"):
        table(tmp_path / "x.xlsx")
    for content, message in (
        ("", "not a readable .csv"),
        ("1,2\n3,4\n", "first line holds numbers"),
        ("a,b\n", "empty"),
    ):
        (tmp_path / "x.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            table(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"not a readable .parquet"):
        table(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="two columns 'a'"):
        table(pd.DataFrame(np.zeros((2, 2)), columns=["a", "a"]))


def test_numbers_that_are_no_codes_are_refused():
    found = table(pd.DataFrame({"c": ["a", "b", "c"], "x": [0.1, 0.2, 0.4]}))
    for code in (1.4, 3.0, -1.0):
        with pytest.raises(DataError, match=rf"column 'c' has {code:g}, which is not a code of its 3 levels"):
            found.frame(torch.tensor([[code, 0.0]]))
    with pytest.raises(DataError, match=r"must have shape \(N, 2\); got \(3,\)"):
        found.frame(torch.zeros(3))


def with_stray(entry, numbers):
    return pd.DataFrame({"age": [*numbers[:7], entry, *numbers[7:]], "x": range(len(numbers) + 1)})


def test_a_stray_text_among_numbers_is_named_and_each_remedy_works():
    numbers = [20.5 + number for number in range(23)]
    frame = with_stray("twenty", numbers)
    with pytest.raises(DataError, match=r"column 'age' has 'twenty' in row 7 .*, where 23 of its 24 values"):
        table(frame)
    assert table(frame, families={"age": "categorical"}).families[0] == ("categorical", 24)
    with pytest.raises(
        DataError, match=r"needs numbers, and 'twenty' in row 7 .* is not a number: frame\['age'\] = pandas"
    ):
        table(frame, families={"age": "normal"})
    frame["age"] = pd.to_numeric(frame["age"], errors="coerce")
    found = table(frame)
    assert found.families[0] == "normal"
    assert found.values[:, 0].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    "entries",
    [["0", "1", "2", "3+"] * 9, [*(["red", "green", "blue"] * 9), "7"], ["02139", "10115", "53111"] * 9],
    ids=["few numbers", "mostly text", "numbers alone"],
)
def test_text_that_may_be_meant_stays_categorical(entries):
    assert table(pd.DataFrame({"x": entries})).families == [("categorical", len(set(entries)))]


@pytest.mark.parametrize(
    ("numbers", "hinted"),
    [
        (range(100, 140), True),
        (np.random.default_rng(0).permutation(40), True),
        (np.random.default_rng(0).integers(0, 10**6, 40), False),
        ([1, *range(1, 40)], False),
        (np.arange(40) + 0.5, False),
    ],
    ids=["ascending", "dense", "incomes", "with a pair", "fractions"],
)
def test_numbers_that_identify_rows_get_a_hint(numbers, hinted, caplog):
    frame = pd.DataFrame({"key": numbers})
    table(frame)
    assert ("drop=['key']" in caplog.text) == hinted
    caplog.clear()
    table(frame, families={"key": "normal"})
    assert not caplog.text
