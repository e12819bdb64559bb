"""What a run would take, worked out from its configuration: read it, count, look for contradictions, print."""
