"""What one upload, and one round, may do to the model: measured, compared, bounded."""
