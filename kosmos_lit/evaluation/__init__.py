"""What evaluation is made of: requests -> model -> scores -> figures. The tasks themselves are in `kosmos_lit.tasks`."""
