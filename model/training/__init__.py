"""Training: the loop, and the parts it is assembled from. `trainer.py` is the loop."""
