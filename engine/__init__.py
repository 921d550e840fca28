"""What one GPU does all day: pages, slots, scheduling, batches, forward, sampling. Token ids in and out."""
