"""The server, as the library installed beside the SuperLink has it."""

from flexlora.deployment.flower import server_app

# Flower looks for the name in this text.
app = server_app.app
