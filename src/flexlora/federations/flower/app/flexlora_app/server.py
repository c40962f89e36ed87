"""The server, as the library installed beside the SuperLink has it."""

from flexlora.federations.flower.server_app import app as app
