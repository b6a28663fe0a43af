"""What a run will need: memory and time from config.json alone."""
