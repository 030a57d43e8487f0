"""Datasets: source files planned into shards, shards tokenised and recorded, records sealed into versions."""
