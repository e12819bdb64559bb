"""What `plan` finds out about a run from its configuration alone: estimates, problems, and the page that shows them."""
