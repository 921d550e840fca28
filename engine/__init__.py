"""What one GPU does all day: pages, slots, scheduling, batches, forward passes, sampling. Token ids in, token ids out."""
