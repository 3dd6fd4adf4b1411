import math

import pytest
from matplotlib.image import imread

from t5x_lite.errors import UserError
from t5x_lite.metrics import MetricsLog
from t5x_lite.train.plot import plot_loss


@pytest.fixture
def run(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(0, 50, 10):
            log.write(step, loss=5.0 - step / 20)
        log.write(40, **{"eval/loss": math.nan})
        log.write(50, **{"eval/loss": 3.0})
    return tmp_path


def colors(path):
    """How many pixels of the picture are near each curve's colour."""
    picture = imread(path)[:, :, :3]
    near = {"training": (0.62, 0.79, 0.88), "held out": (0.85, 0.37, 0.01)}
    return {name: int((abs(picture - rgb).max(axis=-1) < 0.1).sum()) for name, rgb in near.items()}


def test_both_losses_are_drawn(run):
    seen = colors(plot_loss(str(run)))
    assert seen["training"] > 1000, "a line across the picture"
    assert seen["held out"] > 20, "one point and the legend"


def test_the_picture_goes_where_asked(run, tmp_path):
    path = plot_loss(str(run), str(tmp_path / "curve.svg"))
    assert path.read_text().lstrip().startswith("<?xml")


def test_what_cannot_be_drawn_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no losses"):
        plot_loss(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot write"):
        plot_loss(str(run), str(tmp_path / "missing" / "loss.png"))
    with pytest.raises(UserError, match="cannot write"):
        plot_loss(str(run), str(tmp_path / "loss.docx"))
