"""The data owner's side of a federation of real clients."""
