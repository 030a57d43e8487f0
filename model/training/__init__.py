"""Training: `trainer.py` is the loop, `setup.py` assembles it from the other parts."""
