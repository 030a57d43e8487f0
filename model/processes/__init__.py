"""Processes: ranks and devices, torchrun's launcher, ending with a parent, one pod of several."""
