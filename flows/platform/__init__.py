"""The Prefect platform around the flows: server, workers, deployments, automations."""
