"""Evaluation: each kind is a job in a process of its own.

A new evaluation is one function in `jobs.py`, listed in `KINDS`, and its recipe in `model/runs/run.py`.
"""
