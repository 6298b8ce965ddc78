"""Documents of shards into samples of one length, in memory or beforehand."""
