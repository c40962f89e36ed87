"""The client app of the library installed on the node."""

from flexlora.deployment.flower import client_app

# Flower looks for the name in this text.
app = client_app.app
