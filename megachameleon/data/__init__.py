"""From raw text and pictures to samples of token ids.

The way of a document: `sources` reads raw files, `documents` turns a record into ids, `preprocessing` runs that over
units of work and writes `shards`; `packing` lays the documents of a dataset into samples of one length, and `blending`
says which sample of which dataset stands at which position of a run.

    dataset = Dataset.open(Path("shards/pairs"))                    # megachameleon.data.shards
    packed = PackedDataset(dataset, sequence_length=4096, seed=1)   # megachameleon.data.packing
    blend = Blend({"pairs": len(packed)}, [Stage(None, {"pairs": 1.0})], seed=1)   # megachameleon.data.blending
    sample = BlendedSamples(blend, {"pairs": packed})[position]     # a megachameleon.data.samples.Sample
"""
