"""Evaluation: each kind is a job in a process of its own.

To add a kind: write its function in `jobs.py`, list it in `KINDS` there, and give it a recipe in `model/runs/run.py`.
"""
