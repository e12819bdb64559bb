"""Raw files to tokenizers and indexes, once."""
