"""From a model and prompts to tokens: sampling, generation, masks filled. Knows no tokenizer."""
