"""Evaluation: each kind is a job and runs in its own process.

To add a kind: write its function in `jobs.py`, list it in `KINDS` there, and add its recipe to `evaluation_jobs` in
`model/runs/run.py`. New ways to score go to `Evaluator`, settings to `EvaluationConfig` (`model/config.py`), result
fields to `results.Measurement`, and the kind's name to `run_status` in `flows/inspection/status.py`.

A kind that reads a file of items parses it in a module without torch, as `hellaswag.py` does. Follow `items` through
`flows/items.py`, `flows/evaluate.py`, `flows/handoffs.py`, and `check_inputs` in `flows/console/options.py`.
"""
