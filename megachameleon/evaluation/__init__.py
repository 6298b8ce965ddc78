"""How good a trained model is: losses on shards, drawings that are recognised, captions that are right."""
