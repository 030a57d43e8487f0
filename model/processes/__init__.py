"""Ranks and devices, the torchrun launcher, ending with a parent process, one Kubernetes pod."""
