"""The pipeline as Prefect flows: order, retries, fan-out, progress. Never imports torch.

    pretrain ─▶ download ─▶ tokenise ─▶ train ─▶ evaluate ─▶ report

Each stage is a flow in its own module and checks the store for finished work before it starts.

    console/      the `gpt2` command. A new verb goes here.
    runtime/      what stages share: task windows, child processes, progress, artifacts
    inspection/   status, trace and doctor of a store, and deletion of its garbage
    pages/        HTML pages and plots
    platform/     Prefect's server, workers, deployments and automations
"""
