"""Generation and scoring: an `Engine` of model and tokenizer, and its parts."""
