"""The server app of the library installed beside the SuperLink."""

from flexlora.deployment.flower import server_app

# Flower looks for the name in this text.
app = server_app.app
