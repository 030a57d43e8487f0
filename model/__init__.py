"""GPT-2: its configuration, training and evaluation. Never imports Prefect.

    runs/          jobs, and runs pinned to their inputs
    checkpoints/   records of checkpoints, weights, import from and export to Hugging Face
    data/          the order of training windows, and batches of them
    training/      the training loop and its parts
    evaluation/    validation loss, HellaSwag, samples. A new evaluation goes here.
    processes/     ranks, devices, torchrun, parent and child processes, Kubernetes pods

`python -m model STORE JOB` runs one job. The modules that `flows` imports load no torch; import-linter checks it.
"""
