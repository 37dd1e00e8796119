"""CT volumes: read, checked, resampled, segmented and stored with fast random crops."""
