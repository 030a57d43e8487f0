"""Ranks and devices, the torchrun launcher, parent watch, one Kubernetes pod."""
