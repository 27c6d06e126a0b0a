"""Columns are what pyarrow itself would have made, and pandas stays out."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from tsclust_ooc import columns


@pytest.mark.parametrize("values", [[], ["a"], ["", "é", "日本", "x" * 300, ""], ["1"] * 1000])
def test_text_is_what_pyarrow_makes_of_it(values):
    made = columns.text(values)
    made.validate(full=True)
    assert made.equals(pa.array(values, pa.string()))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_one_text_many_times(n):
    assert columns.same_text("traïn", n).equals(pa.array(["traïn"] * n, pa.string()))


@pytest.mark.parametrize(
    "values", [range(0), range(3, 9), [5, -1], np.arange(6, dtype="i4")[::2], np.float32([0.5, np.nan])]
)
def test_numbers_keep_their_type_and_values(values):
    made = columns.numbers(values)
    made.validate(full=True)
    expected = values if isinstance(values, np.ndarray) else np.asarray(values, np.int64)
    assert made.type == pa.from_numpy_dtype(expected.dtype)
    np.testing.assert_array_equal(np.asarray(made), expected)


def test_making_a_table_does_not_import_pandas():
    code = (
        "import sys, numpy as np\nfrom tsclust_ooc import columns\n"
        "made = {'a': columns.text(['x']), 'b': columns.numbers(np.arange(1)), 'c': columns.same_text('y', 1)}\n"
        "columns.table(made)\n"
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
