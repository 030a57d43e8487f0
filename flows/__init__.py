"""The pipeline as Prefect flows: order, retries, fan-out, progress. Never imports torch. README.md lists the modules.

    pretrain ─▶ download ─▶ tokenise ─▶ train ─▶ evaluate ─▶ report

Each stage is a flow in its own module. Every stage but the report skips work that the store already holds.
"""
