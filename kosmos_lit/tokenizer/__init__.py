"""The parts of the tokenizer: control tokens, pieces of two kinds, their files. `kosmos_lit.tokens` joins them."""
