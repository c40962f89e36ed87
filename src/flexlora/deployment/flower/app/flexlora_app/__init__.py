"""What a node is sent: nothing but the name of what is installed there."""
