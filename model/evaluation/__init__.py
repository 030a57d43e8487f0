"""Evaluation: each kind is a job and runs in its own process.

To add a kind: write its function in `jobs.py`, list it in `KINDS` there, and add its recipe to `evaluation_jobs` in
`model/runs/run.py`. Its settings go to `EvaluationConfig`, new result fields to `results.Measurement`, and its name to
`run_status` in `flows/inspection/status.py`.
"""
