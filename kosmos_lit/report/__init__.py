"""Results as pages for people: Markdown and HTML, beside the published figures."""
