"""What a model takes: operations, memory, and the peak rates of devices."""
