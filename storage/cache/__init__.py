"""Shards of a remote store on this host: downloaded once for all processes, verified, evicted by LRU."""
