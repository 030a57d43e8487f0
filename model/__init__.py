"""Everything that computes: the configuration, the tokenizer, GPT-2, its training and its evaluation. Knows no Prefect.

    python -m model <store url> <job key>      one process of a job; torchrun -m model … for many ranks

Torch-free, for the flows too: config, job, tokenizer, run. With torch, in reading order: gpt, optimizer, loader,
distributed, checkpoint, metrics, trainer, evaluation, completion, sampling.
"""
