"""Other people's checkpoints: where they lie, how they are named, what is known of them."""
