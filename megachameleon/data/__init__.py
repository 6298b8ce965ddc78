"""From raw text and pictures to samples of token ids.

The way of a document: `sources` reads raw files, `documents` turns a record into ids, `preprocessing` runs that over
units of work and writes `shards`; `packing` lays the documents of a shard into samples of one length, `packed` presents
the samples of many shards as one dataset, and `blending` says which sample stands at which position of a run.

    pairs = open_packed(["shards/pairs"], 4096, "best_fit")                        # data.packing.packed
    blend = BlendedSamples.of({"pairs": pairs}, [Stage(None, {"pairs": 1.0})], 1)  # data.blending.blending
    sample = blend[position]                                                       # data.samples.Sample
"""
