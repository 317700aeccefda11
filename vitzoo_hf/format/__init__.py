"""What a zoo is on disk and on the Hub: schema, layout, encoding, shards, manifest, files, and readers of weights."""
