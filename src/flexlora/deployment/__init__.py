"""Real clients on machines of their own, over Flower."""
