"""Generation and scoring: settings, prompts, KV cache, logits processors, searches. `inference.generate` joins them."""
