import jax
import numpy as np
import pytest

from t5x_lite.decode.generate import Decoding, generate
from t5x_lite.decode.prompts import positions_of, right_pad
from t5x_lite.errors import UserError


def refused(tiny, name, prompt, decoding=None):
    """The message with which `generate` refuses a prompt, before anything is compiled."""
    model, _ = tiny(name)
    keys = jax.random.wrap_key_data(np.zeros((2, 2), np.uint32))
    with pytest.raises(UserError) as error:
        generate(model, {}, prompt, keys, decoding or Decoding(8))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_right_pad():
    padded = right_pad([[7], [8, 9]], 3, "encoder_")
    assert padded["encoder_tokens"].tolist() == [[7, 0, 0], [8, 9, 0]]
    assert padded["encoder_segments"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert right_pad([[7], [8, 9]])["tokens"].shape == (2, 2)
    with pytest.raises(UserError, match="2 tokens doesn't fit into length=1"):
        right_pad([[7], [8, 9]], 1)


def test_learned_positions_bound_prompt_and_max_tokens(tiny):
    known = positions_of(tiny("gpt2")[0].config.decoder)
    assert known == 1024
    assert positions_of(tiny("llama")[0].config.decoder) is None
    long = right_pad([[1] * 1020, [2]])
    message = refused(tiny, "gpt2", long, Decoding(6))
    assert "1020" in message
    assert "1024" in message
    assert "max_tokens to 5" in message
    message = refused(tiny, "gpt2", right_pad([[1] * 1030, [2]]))
    assert "1030" in message
    assert "shorten it by 6" in message


def test_the_longest_prompt_that_fits_is_accepted(tiny):
    """The last token is chosen, never read: 1020 + 5 tokens take 1024 positions."""
    from t5x_lite.decode.prompts import check

    prompt = right_pad([[1] * 1020, [2]], 1100)  # padding takes no position
    check(tiny("gpt2")[0].config, prompt, 5)


def test_a_cache_that_is_too_small_is_refused(tiny):
    message = refused(tiny, "llama", right_pad([[1, 2], [3]]), Decoding(8, slots=8))
    assert "slots=9" in message


@pytest.mark.parametrize("name", ["llama", "t5_1_0"])
def test_ids_outside_the_vocabulary_are_refused(tiny, name):
    encoder = right_pad([[1], [2]], prefix="encoder_")
    assert "id 100 of tokens" in refused(tiny, name, right_pad([[1], [100]]) | encoder)
    assert "id -1 of tokens" in refused(tiny, name, right_pad([[1], [-1]]) | encoder)
    good = right_pad([[1], [2]])
    assert "id 100 of stop_ids" in refused(tiny, name, good | encoder, Decoding(8, stop_ids=(100,)))
    if name == "t5_1_0":
        encoder = right_pad([[1], [127]], prefix="encoder_")
        assert "id 127 of encoder_tokens" in refused(tiny, name, good | encoder)


def test_rows_must_be_filled_from_the_left(tiny):
    assert "row 1 of tokens is empty" in refused(tiny, "llama", right_pad([[1], []]))
    holed = right_pad([[1, 2], [3]])
    holed["segments"] = np.array([[1, 1], [0, 1]], np.int32)
    assert "then 0" in refused(tiny, "llama", holed)
    packed = right_pad([[1, 2], [3, 4]])
    packed["segments"] = np.array([[1, 2], [1, 1]], np.int32)
    assert "then 0" in refused(tiny, "llama", packed)
    empty = right_pad([[1], []], prefix="encoder_") | right_pad([[0], [0]])
    assert "row 1 of encoder_tokens is empty" in refused(tiny, "t5_1_0", empty)


def test_an_encoder_cannot_generate(tiny):
    assert "encoder-only" in refused(tiny, "bert", right_pad([[1], [2]]))
    with pytest.raises(UserError, match="max_tokens=0"):
        Decoding(0)
