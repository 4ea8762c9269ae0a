"""How a method runs: its driver, memory, checkpoints, and long rows with their inner products."""
