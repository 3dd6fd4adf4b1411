"""What `transformers` says of an export: the class that it names misses nothing and leaves nothing.

Of sources with more than their class reads, every class says what it says of the source.
"""

import json
import shutil

import pytest
import reference
import transformers
from cases import Case, all_cases
from cases.bert_family import ALBERT, DISTILBERT, MOBILEBERT, MODERNBERT, ROBERTA, SHAPE
from cases.decoders import GPT2, LLAMA
from safetensors.numpy import load_file, save_file

from t5x_lite.hub.convert import from_hf, to_hf
from t5x_lite.hub.families import FILES, family_of

GOLDEN = {case.name: case for case in all_cases() if case.golden}
BERT = {**SHAPE, "max_position_embeddings": 13}
PRETRAINING = [
    Case("bert", "BertForPreTraining", BERT),
    Case("albert", "AlbertForPreTraining", ALBERT),
    Case("mobilebert", "MobileBertForPreTraining", MOBILEBERT),
]
BARE = [
    Case("bert", "BertModel", BERT),
    Case("roberta", "RobertaModel", {**SHAPE, **ROBERTA}),
    Case("albert", "AlbertModel", ALBERT),
    Case("mobilebert", "MobileBertModel", MOBILEBERT),
    Case("distilbert", "DistilBertModel", DISTILBERT),
    Case("modernbert", "ModernBertModel", MODERNBERT),
    Case("gpt2", "GPT2Model", GPT2),
    Case("llama", "LlamaModel", LLAMA),
]
# Under the pooling of a sentence embedding, whose class has a head for words all the same.
HEADED = [
    *PRETRAINING,
    Case("roberta", "RobertaForMaskedLM", {**SHAPE, **ROBERTA}),
    Case("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    Case("modernbert", "ModernBertForMaskedLM", MODERNBERT),
]
AUTO = ("AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedLM")


def save(case, folder, sentences=False):
    reference.save(reference.build(case), folder)
    if sentences:
        steps = {"": "Transformer", "1_Pooling": "Pooling"}
        modules = [{"type": f"models.{name}", "path": path} for path, name in steps.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def export(source, folder, published=True):
    """There and back; without `published`, as a run that was trained here."""
    model = from_hf(str(source), str(folder / "run"))
    if not published:
        shutil.rmtree(folder / "run" / "published")
    to_hf(model, str(folder / "run"), str(folder / "out"))
    return folder / "out"


def said(folder, cls):
    """What loading reports, by its kind; empty where all is well."""
    _, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    return {kind: sorted(map(str, found)) for kind, found in info.items() if found}


def named(folder):
    (cls,) = json.loads((folder / "config.json").read_text())["architectures"]
    return cls


def name_of(case):
    return case.model


def same_for_every_class(source, out):
    config = transformers.AutoConfig.from_pretrained(source)
    for cls in AUTO:
        if type(config) in getattr(transformers, cls)._model_mapping:
            assert said(out, cls) == said(source, cls), cls


@pytest.mark.parametrize("case", PRETRAINING, ids=name_of)
def test_pretraining_heads_are_complete(case, tmp_path):
    source = save(case, tmp_path / "source")
    out = export(source, tmp_path)
    assert named(out) == case.model
    assert said(out, case.model) == said(out, "AutoModelForPreTraining") == {}
    same_for_every_class(source, out)


@pytest.mark.parametrize("case", BARE, ids=name_of)
def test_sentence_embeddings_are_complete(case, tmp_path):
    source = save(case, tmp_path / "source", sentences=True)
    out = export(source, tmp_path)
    assert named(out) == case.model
    assert said(out, case.model) == said(out, "AutoModel") == {}
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert {n: v.tobytes() for n, v in before.items()} == {n: v.tobytes() for n, v in after.items()}


@pytest.mark.parametrize("case", HEADED, ids=name_of)
def test_a_head_for_words_stays_beside_a_sentence_embedding(case, tmp_path):
    source = save(case, tmp_path / "source", sentences=True)
    out = export(source, tmp_path)
    assert named(out) == case.model
    assert said(out, case.model) == {}
    same_for_every_class(source, out)


@pytest.mark.parametrize("case", BARE, ids=name_of)
def test_sentence_embeddings_trained_here_are_complete(case, tmp_path):
    source = save(case, tmp_path / "source", sentences=True)
    out = export(source, tmp_path, published=False)
    assert named(out) == case.model
    assert said(out, case.model) == said(out, "AutoModel") == {}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("published", [True, False], ids=["published", "trained here"])
def test_every_family_names_a_class_that_misses_nothing(name, published, tmp_path):
    source = save(GOLDEN[name], tmp_path / "source")
    out = export(source, tmp_path, published)
    assert said(out, named(out)) == {}
    if published:
        assert named(out) == GOLDEN[name].model
        same_for_every_class(source, out)


def test_there_is_a_case_of_every_family():
    configs = [getattr(transformers, case.model).config_class for case in GOLDEN.values()]
    assert {config.model_type for config in configs} == set(FILES)


@pytest.mark.parametrize("case", [*PRETRAINING, *HEADED, *GOLDEN.values()], ids=name_of)
def test_tied_tensors_that_were_stored_too_are_not_missed(case, tmp_path):
    source = save(case, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    family = family_of(json.loads((source / "config.json").read_text())["model_type"])
    repeated = {name: tensors[original] for name, original in family.tied.items()
                if original in tensors and name not in tensors}  # fmt: skip
    save_file({**tensors, **{n: v.copy() for n, v in repeated.items()}},
              source / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    out = export(source, tmp_path)
    # T5's files say so whether its head is tied: one that is stored is a head of its own.
    heads = {"lm_head.weight"} if "T5" in case.model else set()
    assert set(load_file(out / "model.safetensors")) == set(tensors) | heads
    assert said(out, case.model) == {}


def test_what_no_class_reads_goes_out_as_it_came(tmp_path):
    """As bert-base-uncased (a masked LM with more) and TinyBERT (which names no class) have it."""
    source = save(PRETRAINING[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["fit_dense.weight"] = tensors["bert.pooler.dense.weight"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    for number, names in enumerate((["BertForMaskedLM"], ["BertModel"])):
        (source / "config.json").write_text(json.dumps(config | {"architectures": names}))
        (tmp_path / str(number)).mkdir()
        out = export(source, tmp_path / str(number))
        assert said(out, "BertForPreTraining") == {"unexpected_keys": ["fit_dense.weight"]}
        assert said(out, names[0])["unexpected_keys"]
        for cls in ("BertForPreTraining", *AUTO, *names):
            assert said(out, cls) == said(source, cls), cls
