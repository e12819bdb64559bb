"""Building blocks with parameters; each takes its config and leaves initialisation to `init`."""
