"""Updates, checkpoints and the run folder: a killed run goes on as if it had not been."""
