"""The client, as the library installed on the node has it."""

from flexlora.federations.flower.client_app import app as app
