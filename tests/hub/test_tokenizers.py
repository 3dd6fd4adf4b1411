"""Converted models with their tokenizers: bound, refused, and used by `generate` and `eval`."""

import json
import pathlib
import shutil

import pytest
import tokenizers

from t5x_lite import cli
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.data import imported
from t5x_lite.errors import UserError
from t5x_lite.hub.convert import from_hf
from t5x_lite.serve import answers

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROWS = 41  # of the golden models' embeddings
LETTERS = "abcdefghijklmnopqrstuvwxyz .\u2581"


def words(*special):
    """A tokenizer of letters after some special tokens."""
    names = [*special, *LETTERS]
    model = tokenizers.models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


def llama(config):
    tokenizer = words("<s>", "</s>", "<pad>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | config


def bert(config):
    tokenizer = words("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer, names | {"pad_token": "[PAD]"} | config


def t5(config):
    tokenizer = words("<pad>", "</s>", "<unk>")
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(5))]
    tokenizer.add_special_tokens(sentinels)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer, {"eos_token": "</s>", "pad_token": "<pad>"} | config


MAKERS = {"llama": llama, "bert": bert, "t5": t5}
PROMPTS = {"llama": "a cat", "bert": "a [MASK] sat.", "t5": "a <extra_id_0> sat."}


def publish(folder, kind, **config):
    """A golden model with fewer ids than rows."""
    shutil.copytree(GOLDEN / kind, folder)
    tokenizer, config = MAKERS[kind](config)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def converted(kind, tmp_path):
    folder = publish(tmp_path / "source", kind)
    from_hf(str(folder), str(tmp_path / "run"))
    return tmp_path / "run"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_the_run_binds_what_was_published(converted, capsys):
    vocabulary = imported.load(converted / "published")
    assert vocabulary.size < ROWS
    with Checkpointer(converted / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.read_meta()["vocabulary"] == vocabulary.fingerprint
    text = (converted / "model.gin").read_text()
    assert "VOCABULARY = @vocabularies.Imported()" in text
    assert f"vocabularies.Imported.path = '{converted.absolute() / 'published'}'" in text


def test_prompts_and_held_out_text_reach_the_model(converted, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = ("--prompt", PROMPTS[kind], "--temperature", 0, "--max_tokens", 5)
    assert run("generate", "--model_dir", converted, *prompt) == 0
    shown = capsys.readouterr().out
    if kind == "llama":
        assert shown.startswith("a cat")
        assert len(shown) > len("a cat\n")
    elif kind == "bert":
        assert "mask 1: " in shown
    else:
        assert shown.startswith("a")
        assert "sat." in shown
    document = "the cat sat on a mat and the dog ran over the hills far away."
    (tmp_path / "text.txt").write_text("\n\n".join(f"{document[n:]}" for n in range(40)))
    given = ("--gin.TEXT='text.txt'", "--gin.LENGTH=32")
    assert run("data", "prepare", "--gin_file", converted / "config.gin", given[0]) == 0
    assert run("eval", "--model_dir", converted, *given) == 0
    assert "perplexity" in capsys.readouterr().out


def test_another_tokenizer_is_refused(converted, kind, capsys):
    published = converted / "published" / "tokenizer_config.json"
    published.write_text(json.dumps(json.loads(published.read_text()) | {"chat_template": "x"}))
    prompt = ("--prompt", PROMPTS[kind])
    arguments = ("generate", "--model_dir", converted, *prompt, "--max_tokens", 1)
    assert run(*arguments) == 0  # a chat template changes no id
    published.write_text(json.dumps({**json.loads(published.read_text()), "unk_token": "."}))
    capsys.readouterr()
    assert run(*arguments) == 2
    assert "vocabulary: imported-" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama"])
def test_a_run_that_moved_says_what_to_bind(converted, tmp_path, capsys):
    moved = converted.rename(tmp_path / "moved")
    config = moved / "config.gin"
    config.write_text(config.read_text().replace(str(converted), str(moved)))
    arguments = ("generate", "--model_dir", moved, "--prompt", "a", "--max_tokens", 1)
    assert run(*arguments) == 2
    assert "bind Imported.path" in capsys.readouterr().err
    path = f"--gin.vocabularies.Imported.path='{moved / 'published'}'"
    assert run(*arguments, path) == 0


@pytest.mark.parametrize("kind", ["t5"])
def test_a_decoder_starts_with_the_published_id(converted, monkeypatch):
    published = converted / "published"
    (published / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 9}))
    starts, decode = [], answers.generate

    def watched(model, params, batch, *rest):
        starts.extend(batch["tokens"].tolist())
        return decode(model, params, batch, *rest)

    monkeypatch.setattr(answers, "generate", watched)
    prompt = ("--prompt", PROMPTS["t5"], "--max_tokens", 1)
    assert run("generate", "--model_dir", converted, *prompt) == 0
    assert starts == [[9]]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(kind, tmp_path):
    more = [f"<more_{n}>" for n in range(40)]
    source = publish(tmp_path / "source", kind, additional_special_tokens=more)
    size = imported.load(source).size
    assert size > ROWS
    with pytest.raises(UserError, match=f"has {size} ids and the model's embedding {ROWS} rows"):
        from_hf(str(source), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_exactly_as_many_ids_as_rows_fit(tmp_path):
    source = publish(tmp_path / "source", "llama")
    more = [f"<more_{n}>" for n in range(ROWS - imported.load(source).size)]
    source = publish(tmp_path / "full", "llama", additional_special_tokens=more)
    assert imported.load(source).size == ROWS
    from_hf(str(source), str(tmp_path / "run"))


def test_a_model_without_a_tokenizer_binds_none(tmp_path, capsys):
    from_hf(str(GOLDEN / "llama"), str(tmp_path / "run"))
    assert "bind VOCABULARY" in capsys.readouterr().out
    assert "VOCABULARY" not in (tmp_path / "run" / "model.gin").read_text()
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert "vocabulary" not in checkpoints.read_meta()


def test_every_chat_template_is_kept(tmp_path):
    source = publish(tmp_path / "source", "llama")
    (source / "chat_template.jinja").write_text("d")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("r")
    from_hf(str(source), str(tmp_path / "run"))
    kept = tmp_path / "run" / "published"
    assert (kept / "chat_template.jinja").read_text() == "d"
    assert (kept / "additional_chat_templates" / "rag.jinja").read_text() == "r"
