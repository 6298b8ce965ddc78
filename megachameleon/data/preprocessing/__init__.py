"""Raw sources into shards: a plan of units, workers, codes of pictures, states of units."""
