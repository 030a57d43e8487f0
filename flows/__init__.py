"""The pipeline as Prefect flows: order, retries, fan-out. Moves no bytes itself, and never loads torch.

    pretrain ─▶ download ─▶ tokenise ─▶ train ─▶ evaluate ─▶ report
               a task a    shard tasks,  one      val_loss,   report.html,
               file        then seal     process  completion, report.md
                                         group    samples

Each stage is a flow of its own and asks the store what is done before it does anything. `cli` is the console `gpt2`.
"""
