"""Arrays of any kind as tensors: values, types, memory of their own; and what stays as it is."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from pyro_vae.utils.arrays import as_tensor

X = np.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (X, torch.float32),
        (X[::-1].T, torch.float32),
        (X.astype(np.float16), torch.float32),
        (X.astype(">i4"), torch.int32),
        (X > 2, torch.bool),
        (pd.DataFrame(X), torch.float32),
        (pd.DataFrame(X.astype(int)), torch.float32),
        (pd.DataFrame(X)[1], torch.float32),
        (pd.Series([3, 4, 1]), torch.int64),
        (scipy.sparse.coo_array(X).tocsc(), torch.float32),
    ],
)
def test_values_and_types(data, dtype):
    found = as_tensor(data, dtype=torch.float32)
    assert found.dtype == dtype
    assert found.is_contiguous()
    expected = data.toarray() if hasattr(data, "toarray") else np.array(data)
    np.testing.assert_array_equal(found.numpy(), expected)
    found[:] = 0
    assert (data.toarray() if hasattr(data, "toarray") else np.array(data)).any()  # another memory


@pytest.mark.parametrize(
    "value", [None, 2.5, "x", [1.0, 2.0], (X, X), np.float64(3), np.array(3.0), {"x": X}]
)
def test_what_holds_no_rows_stays_as_it_is(value):
    assert as_tensor(value, dtype=torch.float32) is value


def test_tensors_stay_as_they_are():
    x = torch.ones(2, dtype=torch.float64)
    assert as_tensor(x, dtype=torch.float32) is x


def test_what_is_not_numbers_is_refused():
    with pytest.raises(TypeError, match="data must be numbers; got object: select or convert columns"):
        as_tensor(np.array([[None]]), dtype=torch.float32)
    with pytest.raises(TypeError, match="data must be numbers; got the column 'a'"):
        as_tensor(pd.DataFrame({"a": ["x"]}), dtype=torch.float32)
