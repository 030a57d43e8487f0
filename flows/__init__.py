"""The pipeline as Prefect flows: order, retries, fan-out, progress. Never imports torch.

    pretrain ─▶ download ─▶ tokenise ─▶ train ─▶ evaluate ─▶ report

Each stage is a flow in its own module. Every stage but the report skips work that the store already holds.

    console/      the `gpt2` command. A new verb goes here.
    runtime/      what stages share: submitting tasks, child processes, progress, artifacts
    inspection/   status, trace, doctor, gc, and the facts that a report shows
    pages/        HTML pages and plots
    platform/     Prefect's server, workers, deployments and automations
"""
