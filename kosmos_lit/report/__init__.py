"""Reports of evaluations as Markdown and HTML, beside the published results."""
