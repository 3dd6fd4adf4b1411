"""Real weights that come with pip, converted and beside `transformers`."""

import numpy as np
import ours
import pytest
import real
import torch

from t5x_lite import cli
from t5x_lite.hub.convert import from_hf
from t5x_lite.train.restore import restore_params

TEXTS = (
    *real.SENTENCES,
    "Yes.",
    "t5x_lite's café costs 3.50 €; 北京 isn't in the vocabulary as a word.",
    " ".join(["A long text, cut at five hundred and twelve tokens."] * 60),
)
PROMPT = "The capital of France is"


def restored(source, folder):
    model = from_hf(str(source), str(folder))
    return model, restore_params(model, str(folder))[0]


def test_minilm_embeds_sentences(tmp_path):
    expected = real.embeddings(TEXTS)
    assert expected["tokens"].shape == (6, 512)
    model, params = restored(real.minilm(), tmp_path / "run")
    given = ours.outputs(model, params, expected)["embedding"]
    np.testing.assert_allclose(given, expected["embedding"], rtol=0, atol=1e-5)
    cosines = given @ given.T
    assert cosines[0, 1] > 0.7 > 0.2 > max(cosines[0, 2], cosines[1, 2])


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """(theirs, their tokenizer, our model, our parameters, our folder)."""
    folder = tmp_path_factory.mktemp("smollm")
    theirs, tokenizer = real.smollm(folder / "published")
    return theirs, tokenizer, *restored(folder / "published", folder / "run"), folder / "run"


def test_smollm_continues_as_transformers_does(smollm):
    theirs, tokenizer, model, params, _ = smollm
    tokens = tokenizer(PROMPT, return_tensors="np")["input_ids"]
    batch = {"tokens": tokens, "mask": np.ones_like(tokens)}
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        chosen = theirs.generate(
            torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            max_new_tokens=24, min_new_tokens=24, do_sample=False,
        )[0, tokens.shape[1] :]  # fmt: skip
    logits = ours.outputs(model, params, batch)["logits"]
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-5
    given = ours.greedy(model, params, batch, 24)[0]
    np.testing.assert_array_equal(given, chosen.numpy())
    assert tokenizer.decode(given).startswith(" Paris")


def test_smollm_answers_at_the_command_line(smollm, capsys):
    *_, folder = smollm
    cli.main(["generate", "--model_dir", str(folder), "--prompt", PROMPT, "--temperature", "0",
              "--max_tokens", "4"])  # fmt: skip
    assert f"{PROMPT} Paris." in capsys.readouterr().out
