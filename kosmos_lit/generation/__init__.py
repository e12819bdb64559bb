"""The parts of generation: settings, prompts, cache, rules, searches, scoring. `kosmos_lit.generate` joins them."""
