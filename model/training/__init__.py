"""Training: `trainer.py` assembles the other parts and is the loop."""
