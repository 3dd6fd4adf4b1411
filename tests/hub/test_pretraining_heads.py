"""BERT's and ALBERT's head for pairs: read where it is, asked for where the class is another's."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_lite import cli
from t5x_lite.errors import UserError
from t5x_lite.hub.convert import from_hf, to_hf
from t5x_lite.hub.families import read_config
from t5x_lite.nn.heads import MaskedLMHead, PairedLMHead, Pooler

GOLDEN = pathlib.Path(__file__).parent / "golden"
PAIRS = {"bert": "cls.seq_relationship", "albert": "sop_classifier.classifier"}


def source_of(folder, name, cls, without=()):
    shutil.copytree(GOLDEN / f"{name}-pretraining", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [cls]}))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: v for n, v in tensors.items() if not n.startswith(without)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", PAIRS)
def test_a_masked_lm_with_more_is_read_as_what_is_asked_for(tmp_path, name):
    """As bert-base-uncased: a BertForMaskedLM that holds all of a BertForPreTraining."""
    family = {"bert": "Bert", "albert": "Albert"}[name]
    source = source_of(tmp_path / "source", name, f"{family}ForMaskedLM")
    for cls, head in ((None, MaskedLMHead), (f"{family}ForPreTraining", PairedLMHead),
                      (f"{family}Model", Pooler)):  # fmt: skip
        run, out = tmp_path / f"run-{cls}", tmp_path / f"out-{cls}"
        more = [] if cls is None else ["--architecture", cls]
        assert cli.main(["convert", "from-hf", str(source), str(run), *more]) == 0
        unread = run / "published" / "unread"
        assert unread.exists() == (head is not PairedLMHead)
        model = read_config(json.loads((run / "published" / "config.json").read_text()))
        assert type(model.head) is head
        to_hf(model, str(run), str(out))
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [cls or f"{family}ForMaskedLM"]
        before, after = (
            load_file(source / "model.safetensors"),
            load_file(out / "model.safetensors"),
        )
        assert set(before) == set(after)
        for tensor, value in before.items():
            np.testing.assert_array_equal(after[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("name", PAIRS)
def test_without_the_head_for_pairs_it_is_a_masked_lm(tmp_path, name):
    """As TinyBERT's general checkpoints, which say ForPreTraining."""
    cls = {"bert": "BertForPreTraining", "albert": "AlbertForPreTraining"}[name]
    source = source_of(tmp_path / "source", name, cls, without=(PAIRS[name],))
    assert type(from_hf(str(source), str(tmp_path / "run")).head) is MaskedLMHead
    with pytest.raises(UserError, match=f"lacks tensors of {cls}; leave --architecture out"):
        from_hf(str(source), str(tmp_path / "asked"), cls)
    assert not (tmp_path / "asked").exists()


def test_a_class_that_the_family_lacks_is_refused(tmp_path):
    source = source_of(tmp_path / "source", "bert", "BertForMaskedLM")
    with pytest.raises(UserError, match="architecture BertForQuestions is unknown"):
        from_hf(str(source), str(tmp_path / "run"), "BertForQuestions")
    with pytest.raises(UserError, match="lacks tensors that"):
        from_hf(str(source), str(tmp_path / "run"), "BertForTokenClassification")
    assert not (tmp_path / "run").exists()
