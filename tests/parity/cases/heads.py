"""Heads of rows, of tokens, of spans, and of pairs of texts beside words."""

from cases import Case
from cases.bert_family import ALBERT, DISTILBERT, ROBERTA, SHAPE

# One layer is enough below a head.
BERT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "vocab_size": 23, "max_position_embeddings": 13,
}  # fmt: skip
# The classifiers of decoders look for the last token that isn't the padding one.
GPT2 = {
    "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 13, "vocab_size": 23, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "vocab_size": 23, "rms_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip


def labels(count: int) -> dict:
    """Fields of a config whose labels have names of their own."""
    names = [f"kind {number}" for number in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


CLASSIFIER, GPT, LLAMAS = (
    f"{family}ForSequenceClassification" for family in ("Bert", "GPT2", "Llama")
)

CASES = [
    Case("bert-classifier", CLASSIFIER, {**BERT, **labels(3)}, golden=True, quick=True),
    Case("bert-regression", CLASSIFIER, {**BERT, **labels(1)}),
    Case("bert-tokens", "BertForTokenClassification", {**BERT, **labels(5)}, golden=True),
    Case("bert-two-kinds-of-token", "BertForTokenClassification", BERT),
    Case("bert-answers", "BertForQuestionAnswering", BERT, golden=True),
    Case("bert-pretraining", "BertForPreTraining", BERT, golden=True, quick=True),
    Case("albert-pretraining", "AlbertForPreTraining", ALBERT, golden=True),
    Case("roberta-classifier", "RobertaForSequenceClassification",
         {**SHAPE, **ROBERTA, **labels(3), "num_hidden_layers": 1}, golden=True),
    Case("roberta-tokens", "RobertaForTokenClassification", {**SHAPE, **ROBERTA, **labels(4)}),
    Case("roberta-answers", "RobertaForQuestionAnswering", {**SHAPE, **ROBERTA}),
    Case("distilbert-classifier", "DistilBertForSequenceClassification",
         {**DISTILBERT, "n_layers": 1}, golden=True),
    Case("distilbert-tokens", "DistilBertForTokenClassification", {**DISTILBERT, **labels(4)}),
    Case("distilbert-answers", "DistilBertForQuestionAnswering", DISTILBERT),
    Case("albert-classifier", "AlbertForSequenceClassification", {**ALBERT, **labels(3)}),
    Case("gpt2-classifier", GPT, {**GPT2, **labels(3)}, golden=True, quick=True),
    Case("gpt2-reward", GPT, {**GPT2, **labels(1)}),
    Case("llama-classifier", LLAMAS, {**LLAMA, "tie_word_embeddings": True}),
    Case("llama-reward", LLAMAS, {**LLAMA, "num_key_value_heads": 1, **labels(1)},
         golden=True),
]  # fmt: skip
