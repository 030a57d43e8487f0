"""Training: `trainer.py` assembles the other parts and runs the loop."""
