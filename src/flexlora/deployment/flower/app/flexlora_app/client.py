"""The client, as the library installed on the node has it."""

from flexlora.deployment.flower import client_app

# Flower looks for the name in this text.
app = client_app.app
