"""Ranks and devices, the torchrun launcher, parent and child processes, Kubernetes."""
