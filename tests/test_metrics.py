import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite.errors import UserError
from t5x_lite.metrics import FILE_NAME, MetricsLog


def lines(model_dir):
    return (model_dir / FILE_NAME).read_bytes().splitlines(keepends=True)


finite = {"allow_nan": False, "allow_infinity": False}
numbers = st.tuples(
    st.floats(width=32, **finite), st.floats(**finite), st.integers(-(2**63), 2**63 - 1)
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(numbers, min_size=1))
def test_numbers_come_back_bit_for_bit(tmp_path_factory, numbers):
    with MetricsLog(tmp_path_factory.mktemp("run")) as log:
        for single, double, whole in numbers:
            log.write(np.int64(7), loss=np.float32(single), rate=double, tokens=np.int64(whole))
            log.write(8, loss=np.asarray(single, np.float32), rate=np.float64(double), tokens=whole)
        rows = log.read()
    for row, (single, double, whole) in zip(rows, [n for n in numbers for _ in "ab"], strict=True):
        assert np.float32(row["loss"]).tobytes() == np.float32(single).tobytes()
        assert np.float64(row["rate"]).tobytes() == np.float64(double).tobytes()
        assert row["tokens"] == whole
        assert type(row["tokens"]) is type(row["step"]) is int
    assert [row["step"] for row in rows] == [7, 8] * len(numbers)


def test_each_row_is_one_line_of_json_and_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(20, loss=5.125, **{"eval/loss": np.float32(0.1)}, name="a\nb", done=np.bool_(True))
    assert lines(tmp_path) == [
        b'{"step": 20, "loss": 5.125, "eval/loss": 0.10000000149011612, '
        b'"name": "a\\nb", "done": true}\n'
    ]
    log.write(21, half=ml_dtypes.bfloat16(1.5))
    assert json.loads(lines(tmp_path)[1]) == {"step": 21, "half": 1.5}
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_lacks_is_null_and_reads_as_nan(tmp_path, value):
    with MetricsLog(tmp_path) as log:
        log.write(1, loss=value)
    assert lines(tmp_path) == [b'{"step": 1, "loss": null}\n']
    assert math.isnan(log.read()[0]["loss"])


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"{"])
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, torn):
    with MetricsLog(tmp_path) as log:
        log.write(1, loss=1.0)
        log.write(2, loss=2.0)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in MetricsLog(tmp_path).read()] == [1, 2]
    with MetricsLog(tmp_path) as log:
        log.write(3, loss=3.0)
    assert [row["loss"] for row in log.read()] == [1.0, 2.0, 3.0]
    assert all(json.loads(line) for line in lines(tmp_path))


@pytest.mark.parametrize("cut", [0, 3, 5, 99])
def test_cut_back_keeps_the_bytes_up_to_the_step(tmp_path, cut):
    with MetricsLog(tmp_path) as log:
        for step in (1, 3, 3, 5, 8):
            log.write(step, loss=step / 3)
        before = lines(tmp_path)
        (tmp_path / FILE_NAME).write_bytes(b"".join(before) + b'{"torn')
        log.cut_back(cut)
        kept = [line for line in before if json.loads(line)["step"] <= cut]
        assert lines(tmp_path) == kept
        log.write(cut + 1, loss=0.5)
    assert lines(tmp_path) == [*kept, json.dumps({"step": cut + 1, "loss": 0.5}).encode() + b"\n"]
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_nothing_is_made_before_the_first_write(tmp_path):
    log = MetricsLog(tmp_path / "run")
    log.cut_back(10)
    assert log.read() == []
    assert list(tmp_path.iterdir()) == []
    log.write(1)
    log.close()
    assert log.read() == [{"step": 1}]


@pytest.mark.parametrize("line", ["oops\n", "[1]\n", '{"loss": 1}\n', '{"step": null}\n', "\n"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / FILE_NAME).write_text('{"step": 1}\n' + line + '{"step": 2}\n')
    for use in (MetricsLog.read, lambda log: log.cut_back(1), lambda log: log.write(3)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a row"):
            use(MetricsLog(tmp_path))
    assert (tmp_path / FILE_NAME).read_text().count("\n") == 3


def test_disk_errors_are_for_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        MetricsLog(tmp_path / "file").write(1)
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        MetricsLog(tmp_path).read()


def test_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match="loss must be a scalar, not ndarray"):
        MetricsLog(tmp_path).write(1, loss=np.ones(2))
