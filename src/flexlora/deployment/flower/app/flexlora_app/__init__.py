"""The app that nodes are sent: only imports of the library installed there."""
