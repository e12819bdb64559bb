"""Evaluation of a model on tasks: requests -> model -> scores -> metrics. The tasks themselves are in `kosmos_lit.tasks`."""
