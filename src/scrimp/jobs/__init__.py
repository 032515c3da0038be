"""End-to-end tasks that a person runs: the only code that uses accelerate and owns a loop."""
