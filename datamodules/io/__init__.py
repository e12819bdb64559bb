"""Files, processes and locks below the data modules."""
